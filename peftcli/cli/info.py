"""``peftcli info``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from peftcli.cli import console
from peftcli.cli.options import Json
from peftcli.methods import METHODS

_PACKAGES = ("peftcli", "torch", "transformers", "accelerate", "datasets", "safetensors", "huggingface-hub")


def info(
    what: Annotated[
        str,
        typer.Argument(metavar="[ADAPTER|methods|tasks|env]", help="An adapter (folder or hub id), or what to list."),
    ] = "env",
    updates: Annotated[
        bool, typer.Option("--updates/--no-updates", help="Show how much an adapter changes each weight.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Show an adapter, the methods, the tasks, or what is installed."""
    tables = {"methods": _methods, "tasks": _tasks}
    if what == "env":
        _env(as_json)
    elif what in tables:
        rows = tables[what]()
        if as_json:
            console.print_json({what: rows})
        else:
            console.table(list(rows[0]), [list(row.values()) for row in rows])
    else:
        _adapter(what, updates, as_json)


def _adapter(adapter: str, updates: bool, as_json: bool) -> None:
    """Print an adapter's facts; those that need no torch come before its import, which takes seconds."""
    from peftcli.adapters.info import describe

    facts = describe(adapter)
    if not as_json:
        _print_facts(facts)
    if not updates:
        return console.print_json(facts) if as_json else None
    from peftcli.adapters.diff import analyse

    found = analyse(adapter)
    if as_json:
        return console.print_json({**facts, "updates": found})
    if "reason" in found:
        return console.out(f"updates: cannot be computed: {found['reason']}")
    console.out(f"norm of all updates: {found['norm']:.4g}")
    console.out(f"dead modules: {', '.join(found['dead']) or 'none'}\n")
    rows = [[m["module"], m["r"], f"{m['norm']:.4g}", f"{m['effective_r']:.1f}"] for m in found["modules"]]
    return console.table(["module", "r", "norm", "effective r"], rows)


def _methods() -> list[dict[str, Any]]:
    return [
        {"method": name, "peft_type": row.peft_type, "summary": row.summary, "paper": row.paper}
        for name, row in METHODS.items()
    ]


def _tasks() -> list[dict[str, Any]]:
    from peftcli.tasks import TASKS

    return [
        {"task": name, "task_type": row.task_type, "auto_class": row.auto_class, "summary": row.summary}
        for name, row in TASKS.items()
    ]


def _env(as_json: bool) -> None:
    """Print versions and devices; the versions come before the import of torch, which takes seconds and may fail."""
    import platform

    facts = {"python": platform.python_version(), "platform": platform.platform()}
    facts |= {name: _version(name) for name in _PACKAGES}
    if as_json:
        return console.print_json({**facts, "devices": _devices()})
    _print_facts(facts)
    return _print_facts({"devices": _devices()})


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [f"torch cannot be imported: {error}"]
    if torch.cuda.is_available():
        return [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    return ["mps"] if torch.backends.mps.is_available() else [f"cpu, {torch.get_num_threads()} threads"]


def _print_facts(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        # soft prompts adapt no module, and OFT's r is 0 where its blocks have a size
        if value not in (None, []) and (name, value) not in (("r", 0), ("modules_adapted", 0)):
            console.out(f"{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
