"""``peftcli runs``."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from peftcli.cli import console
from peftcli.cli.options import Json, path
from peftcli.data.rows import count_of
from peftcli.reporting.blocks import clock, gib, setting_text

_Folder = Annotated[Path, typer.Argument(metavar="DIR", parser=path, help="Folder with run folders at any depth.")]
_Sort = Annotated[
    str | None,
    typer.Option(metavar="KEY", help="Metric, setting, name, status, base, method, time or memory; -KEY: descending."),
]
_Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", parser=path, help="Draw all curves on one picture, .png or .svg.")
]
_WIDTH = 80
"""Of a table where no terminal says how wide it is."""
_FACTS = ("status", "base", "method", "task")


def runs(folder: _Folder, sort: _Sort = None, plot: _Plot = None, as_json: Json = False) -> None:
    """List the runs below a folder: what differs, and what came of it."""
    from peftcli.train.runs.listing import list_runs

    found = list_runs(folder, sort, plot)
    if as_json:
        console.print_json(found)
        return
    if found["runs"]:
        _print(found["runs"])
    for each in found["damaged"]:
        console.log(f"warning: {each['folder']} is left out: {each['message']}")
    if plot is not None:
        console.out(f"picture  {plot}")


def _print(rows: Sequence[dict[str, Any]]) -> None:
    """Print what all runs share in a line, and a table of the rest; what differs below each row if it does not fit."""
    same = [key for key in _FACTS if len({row[key] for row in rows}) == 1]
    shared = ", ".join(f"{key} {rows[0][key]}" for key in same)
    width = shutil.get_terminal_size((_WIDTH, 24)).columns if console.is_terminal(sys.stdout) else _WIDTH
    head = f"{count_of(len(rows), 'run')}{': ' if shared else ''}{console.clean(shared)}"
    console.out(textwrap.fill(head, width, subsequent_indent="    "))
    metrics = {row["main"] for row in rows}
    status = ["status"] if "status" not in same and len(metrics) == 1 else []  # beside names of metrics is no room
    columns = ["run", *status, metrics.pop() if len(metrics) == 1 else "main metric", "time", "memory"]
    cells = [[row["name"], *(row[key] for key in status), *_measured(row, bool(metrics))] for row in rows]
    differ = _differing(rows, [key for key in _FACTS if key not in (*same, *status)])
    wide = [*columns[:-3], *differ, *columns[-3:]]
    drawn = [[*line[:-3], *(each[index] for each in differ.values()), *line[-3:]] for index, line in enumerate(cells)]
    if _width(wide, drawn) <= width:
        console.table(wide, drawn)
        return
    _fit(columns, cells, width)
    widths = [max(len(line[index]) for line in [columns, *cells]) for index in range(len(columns))]
    usual = {name: Counter(values).most_common(1)[0][0] for name, values in differ.items()}
    for index, line in enumerate([columns, *cells]):
        console.out("  ".join(cell.ljust(size) for cell, size in zip(line, widths, strict=True)).rstrip())
        own = {name: values[index - 1] for name, values in differ.items() if index and values[index - 1] != usual[name]}
        if own:
            text = "  ".join(f"{name}={value}" for name, value in own.items())
            console.out(textwrap.fill(text, width, initial_indent="    ", subsequent_indent="    "))
    common = ", ".join(f"{name}={value}" for name, value in usual.items() if value)
    console.out(textwrap.fill(f"where nothing else is said: {common}", width, subsequent_indent="    "))


def _differing(rows: Sequence[dict[str, Any]], facts: Sequence[str]) -> dict[str, list[str]]:
    """What differs between runs: its short name, and the value in each run."""
    keys = list(dict.fromkeys(key for row in rows for key in row["settings"]))
    found = {key: [str(row[key]) for row in rows] for key in facts}
    return found | {name: [_setting(row, key) for row in rows] for name, key in zip(_short(keys), keys, strict=True)}


def _width(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> int:
    return sum(max(len(line[index]) for line in [columns, *cells]) + 2 for index in range(len(columns))) - 2


def _fit(columns: Sequence[str], cells: Sequence[list[str]], width: int) -> None:
    """Shorten the names of runs, at their beginning, until the table fits; --json has them whole."""
    longest = max(len(line[0]) for line in cells)
    room = max(12, longest - max(0, _width(columns, cells) - width))
    for line in cells:
        if len(line[0]) > room:
            line[0] = f"...{line[0][3 - room :]}"


def _short(settings: Sequence[str]) -> list[str]:
    """The last part of each setting's name, where that tells them apart."""
    ends = [key if key.startswith("gates.") else key.rpartition(".")[2] for key in settings]
    return [end if ends.count(end) == 1 else key for end, key in zip(ends, settings, strict=True)]


def _setting(row: dict[str, Any], key: str) -> str:
    value = row["settings"].get(key)
    return "" if value in (None, [], {}) else console.shorten(console.clean(setting_text(value)), 40)


def _measured(row: dict[str, Any], is_named: bool) -> list[str]:
    """The main metric, with the interval of its difference from the base model's; time and memory."""
    seconds, memory, found = row["seconds"], row["memory_bytes"], row["metrics"].get(row["main"])
    metric = "" if found is None else f"{row['main']} " * is_named + f"{found['value']:.4f}"
    if found is not None and "low" in found:
        metric += f" ({found['low']:+.3f} to {found['high']:+.3f})"
    return [metric, "" if seconds is None else clock(seconds), "" if memory is None else gib(memory)]
