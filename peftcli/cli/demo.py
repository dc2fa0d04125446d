"""``peftcli demo``."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from peftcli.cli import console
from peftcli.cli.options import Json, Quiet, not_empty, progress_log
from peftcli.cli.progress import Progress
from peftcli.errors import GateFailed, UsageError

_Task = Annotated[str | None, typer.Argument(help="Task, as `peftcli info tasks` names it. Left out: list the demos.")]
_All = Annotated[bool, typer.Option("--all", help="Run the demo of every task.")]
_Output = Annotated[
    str,
    typer.Option("--output", parser=not_empty, help="Folder for data, recipe and adapter, in a folder for each task."),
]


def demo(
    task: _Task = None,
    every: _All = False,
    output: _Output = "peftcli-demo",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a task on this computer, before and after training."""
    from peftcli.demos.run import about, lines, require_packages, run_demo
    from peftcli.demos.table import DEMOS
    from peftcli.recipe import why_failed

    if task is not None and (every or task not in DEMOS):
        raise UsageError("give a task or --all" if every else f"no demo of {task}", hint=f"one of {', '.join(DEMOS)}")
    listed = [about(name) for name in DEMOS]
    if task is None and not every:
        return _list(listed, as_json)
    tell, chosen = progress_log(quiet), [name for name in DEMOS if every or name == task]
    require_packages(chosen)
    done: list[dict[str, Any]] = []
    for name in chosen:
        demo = DEMOS[name]
        if not as_json:
            minutes = max(1, round(demo.seconds / 60))
            console.out(f"{name}: {demo.model} learns to {demo.summary}; about {minutes} min on 2 cores")
        started = time.perf_counter()
        with Progress(quiet=quiet) as progress:
            result = run_demo(name, Path(output) / name, tell, progress.show)
        done.append(asdict(result))
        tell(f"{name}: {time.perf_counter() - started:.0f} s")
        if not as_json:
            for line in lines(result):
                console.out(line)
    if as_json:
        console.print_json({"demos": done})

    failed = [
        f"{result['task']}: {why_failed(gate)}" for result in done for gate in result["gates"] if not gate["passed"]
    ]
    if failed:
        raise GateFailed("; ".join(failed), key="gates")
    return None


def _list(listed: list[Any], as_json: bool) -> None:
    """Print the demos."""
    if as_json:
        console.print_json({"available": listed})
        return
    rows = [(row["task"], row["model"], f"{row['seconds']} s", f"{row['download_mb']} MB") for row in listed]
    console.table(("task", "model", "about", "download"), rows)
    console.out("next:")
    console.out(f"  peftcli demo {listed[0]['task']}")
    console.out("  peftcli demo --all")
