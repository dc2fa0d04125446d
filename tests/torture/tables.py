"""Read cases from a table: a YAML file of rows ``name: [how, argument, ..., {setting: value}]``, grouped by class.

``how`` is a function of the module that has the cases. In a row, ``<NAME>`` stands for a constant of that module, and

| cell | is |
| --- | --- |
| ``{=name: [argument, ...]}`` | what a function of the module returns |
| ``{=folder.name: [argument, ...]}``, ``{=hub.name: ...}`` | a call of that method of what the case spoils |
| ``{=text: [part, [part, times], ...]}`` | a text too long to write out |
| ``{=bytes: [part, ...]}`` | the same in bytes, each as a character of Latin-1 |
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import yaml

_HERE = Path(__file__).parent / "cases"
_KNOWN = {"GONE": ..., "MKFIFO": os.mkfifo, "MKDIR": Path.mkdir}
"""Constants of every table; GONE takes a key away."""


def cases(table: str, module: Mapping[str, Any], /, **more: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the cases of a table by class and name; ``more`` are those of a class that are made otherwise."""
    names = _KNOWN | {name.lstrip("_"): value for name, value in module.items()}
    found = {
        of: {name: _call(names[how], cells, names) for name, (how, *cells) in own.items()}
        for of, own in rows(table).items()
    }
    for of, others in more.items():
        known = found.setdefault(of, {})
        assert not known.keys() & others.keys(), f"{of} has a case twice"
        known |= others
    return found


def rows(table: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a table as they stand there, by class and name."""
    read: dict[str, dict[str, Any]] = yaml.safe_load((_HERE / f"{table}.yaml").read_text(encoding="utf-8"))
    return read


def _call(function: Any, cells: list[Any], names: Mapping[str, Any]) -> Any:
    """Call a function with the cells of a row; a mapping at the end that calls nothing has its settings."""
    settings: dict[str, Any] = {}
    if cells and isinstance(cells[-1], dict) and not str(next(iter(cells[-1]), "")).startswith("="):
        *cells, settings = cells
    return function(*(_made(each, names) for each in cells), **_made(settings, names))


def _made(cell: Any, names: Mapping[str, Any]) -> Any:
    """Return what a cell stands for."""
    if isinstance(cell, str):
        if whole := re.fullmatch(r"<([A-Z_]+)>", cell):
            return names[whole[1]]
        return re.sub(r"<([A-Z_]+)>", lambda found: names[found[1]], cell)
    if isinstance(cell, list):
        return [_made(each, names) for each in cell]
    if not isinstance(cell, dict):
        return cell
    how = str(next(iter(cell), ""))
    if how in ("=text", "=bytes"):
        parts = [each if isinstance(each, list) else [each, 1] for each in cell[how]]
        texts = [(_made(part, names), times) for part, times in parts]
        if how == "=text":
            return "".join(text * times for text, times in texts)
        return b"".join((text.encode("latin-1") if isinstance(text, str) else text) * n for text, n in texts)
    if how.startswith(("=folder.", "=hub.")):
        return _call(partial(methodcaller, how.partition(".")[2]), cell[how], names)
    if how.startswith("="):
        return _call(names[how[1:]], cell[how], names)
    return {_made(key, names): _made(value, names) for key, value in cell.items()}
