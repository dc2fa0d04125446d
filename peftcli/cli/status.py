"""``peftcli status``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from peftcli.cli import console
from peftcli.cli.options import Json, path
from peftcli.data.rows import count_of
from peftcli.reporting.blocks import in_order
from peftcli.system.signals import check as check_signals

_INTERVAL = 1.0
"""Seconds between two looks at a run."""


def status(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", parser=path, help="Run folder: a recipe's training.output_dir.")
    ],
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow the run until it ends; then end with its exit code.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show whether a run is running, complete, interrupted or failed."""
    from peftcli.train.runs.status import status as read_status

    found = read_status(folder)
    if watch:
        found = _follow(folder, found, read_status, as_json)
    if as_json:
        console.print_json(found)
    elif not watch or console.is_terminal(sys.stdout):
        console.out(_text(folder, found))
    if watch:
        raise typer.Exit(found["exit_code"] or 0)


def _follow(
    folder: Path, found: dict[str, Any], read: Callable[[Path], dict[str, Any]], as_json: bool
) -> dict[str, Any]:
    """Show a run while it runs; return how it ended. On a terminal its status is redrawn, else a change is a line."""
    redraws = console.is_terminal(sys.stdout) and not as_json
    last = ""
    with console.redrawn() if redraws else nullcontext(lambda text: None) as draw:
        while True:
            if redraws:
                draw(_text(folder, found))
            elif (line := _progress(found)) != last:
                (console.log if as_json else console.out)(line)
                last = line
            if found["status"] != "running":
                return found
            time.sleep(_INTERVAL)
            check_signals()
            found = read(folder)


def _progress(found: dict[str, Any]) -> str:
    """Return how far a run is, on one line."""
    steps, last = found["steps"], found["last"]
    loss = f", loss {last['loss']:.4f}" if last and "loss" in last else ""
    measured = in_order(found["eval"] or {}, "eval_loss")[:1]
    metric = "".join(f", {name} {found['eval'][name]:.4f}" for name in measured)
    return f"{_state(found)}: step {steps['done']} of {steps['total'] or '?'}{loss}{metric}"


def _text(folder: Path, found: dict[str, Any]) -> str:
    return "\n".join([f"{folder}: {_state(found)}", *(f"  {line}" for line in _lines(found))])


def _state(found: dict[str, Any]) -> str:
    state, error = found["status"], found["error"]
    if state == "running":
        return f"running, process {found['pid']}"
    if state == "interrupted" and found["exit_code"] == 137:
        return "interrupted: the process ended without recording a reason"
    if state in ("interrupted", "failed") and error:
        return f"{state}, exit code {found['exit_code']}: {error['message']}"
    return f"{state}, exit code {found['exit_code']}" if found["exit_code"] else str(state)


def _lines(found: dict[str, Any]) -> list[str]:
    steps, last, attempts = found["steps"], found["last"], count_of(len(found["attempts"]), "attempt")
    lines = [f"steps        {steps['done']} of {steps['total'] or '?'}, in {attempts}"]
    if last and "loss" in last:
        lines.append(f"loss         {last['loss']:.4f} after step {last['step']}")
    measured = found["eval"] or {}
    width = max([12, *map(len, measured)])
    lines += [f"{name:<{width}} {measured[name]:.4f}" for name in in_order(measured, "eval_loss")]
    for gate in found["gates"]:
        lines.append(f"gate         {gate['metric']} {gate['gate']}: {'passed' if gate['passed'] else 'FAILED'}")
    if found["checkpoints"]:
        lines.append(f"checkpoints  {', '.join(found['checkpoints'])}")
    for change in found["changes"]:
        lines.append(f"changed      {change['key']}: {change['before']!r} -> {change['now']!r}, step {change['step']}")
    if found["replacement"]:
        lines.append(f"replacement  a run that will replace it is {found['replacement']}")
    if found["resumable"] and found["status"] != "running":
        lines.append("next         run the same `peftcli train` again to resume")
    return lines
