"""``peftcli info``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from statistics import fmean
from typing import Annotated, Any

import typer

from peftcli.cli import console
from peftcli.cli.options import Json
from peftcli.methods import METHODS

_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")
_MAX_ROWS = 8
"""Modules, or kinds of them, that are shown without --updates."""
_PACKAGES = ("peftcli", "torch", "transformers", "accelerate", "datasets", "safetensors", "huggingface-hub")


def info(
    what: Annotated[
        str,
        typer.Argument(metavar="[ADAPTER|methods|tasks|env]", help="An adapter (folder or hub id), or what to list."),
    ] = "env",
    updates: Annotated[
        bool | None,
        typer.Option(
            "--updates/--no-updates",
            help="Show how much an adapter changes each weight, or not at all; by default each kind of module.",
        ),
    ] = None,
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


def _adapter(adapter: str, updates: bool | None, as_json: bool) -> None:
    """Print an adapter's facts; those that need no torch come before its import, which takes seconds."""
    from peftcli.adapters.info import describe

    facts = describe(adapter)
    if not as_json:
        _print_facts(_in_short(facts))
    if updates is False:
        return console.print_json(facts) if as_json else None
    from peftcli.adapters.diff import analyse

    found = analyse(adapter)
    if as_json:
        return console.print_json({**facts, "updates": found})
    if "reason" in found:
        return console.out(f"updates: cannot be computed: {found['reason']}")
    console.out(f"norm of all updates: {found['norm']:.4g}")
    dead = found["dead"] if updates else found["dead"][:_MAX_ROWS]
    more = f", and {len(found['dead']) - len(dead)} more" if len(found["dead"]) > len(dead) else ""
    console.paragraph(f"dead modules: {', '.join(dead) or 'none'}{more}\n")
    if updates or len(found["modules"]) <= _MAX_ROWS:
        return console.table(["module", "r", "norm", "effective r"], list(map(_updates_of, found["modules"])))
    return _print_kinds(found["modules"])


def _in_short(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts for a reader: PEFT's names beside the method, and of the file one line."""
    out = {name: value for name, value in facts.items() if name not in ("peft_type", "task_type", "dtypes", "bytes")}
    names = ", ".join(filter(None, (facts["peft_type"], facts["task_type"])))
    stored = f"{facts['tensors']} in {', '.join(facts['dtypes'])}, {console.format_size(facts['bytes'])}"
    return out | {"method": f"{facts['method']} ({names})", "tensors": stored}


def _print_kinds(modules: Sequence[dict[str, Any]]) -> None:
    """Print a row for the modules whose names differ in numbers alone, those of the largest updates first."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for each in modules:
        kinds.setdefault(_NUMBER.sub("*", each["module"]), []).append(each)
    together: list[dict[str, Any]] = [
        {
            "module": name,
            "r": ", ".join(map(str, sorted({each["r"] for each in found}))),
            "norm": math.hypot(*(each["norm"] for each in found)),
            "effective_r": fmean(each["effective_r"] for each in found),
        }
        for name, found in kinds.items()
    ]
    together.sort(key=lambda row: row["norm"], reverse=True)
    rows = [[*_updates_of(row), len(kinds[row["module"]])] for row in together[:_MAX_ROWS]]
    console.table(["modules", "r", "norm", "effective r", "count"], rows)
    left = f"{len(together) - _MAX_ROWS} more kinds; " if len(together) > _MAX_ROWS else ""
    console.out(f"{left}--updates shows each module")


def _updates_of(row: dict[str, Any]) -> list[Any]:
    return [row["module"], row["r"], f"{row['norm']:.4g}", f"{row['effective_r']:.1f}"]


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
