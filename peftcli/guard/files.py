"""Files that anybody may have written: opened once, regular or refused, read with a bound. No torch here."""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections import Counter
from io import BufferedReader
from pathlib import Path
from typing import Any

from peftcli.errors import AdapterError, PeftcliError

_DEEPEST = 64
_LONGEST, _LONGEST_NAME = 600, 160
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 80
_shortened.maxlist = _shortened.maxdict = 4
_shortened.maxlevel = 3


def read_small(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes; a pipe or device is not waited for.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, or larger.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("no regular file")
        if found.st_size > limit:
            raise ValueError(f"it has {found.st_size:,} bytes, and at most {limit:,} are read")
        return file.read(limit)


def shown(value: object) -> str:
    """A value of somebody's file for a message: on one line, no longer than some words, nothing to steer a terminal."""
    return _shortened.repr(value)


def shown_name(name: str) -> str:
    """As ``shown``, of a name: without quotes while it needs none."""
    return name if name.isprintable() and len(name) <= _LONGEST_NAME else shown(name)


def cut(text: str) -> str:
    """A message that may repeat what a file says, on one line and no longer than a paragraph."""
    text = "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text[:_LONGEST]
    )
    return text if len(text) < _LONGEST else f"{text[:_LONGEST]} ..."


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading; a pipe or device is neither waited for nor read.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind != stat.S_IFREG:
        os.close(handle)
        raise ValueError(f"it is {_KINDS.get(kind, 'something')}, no regular file")
    return os.fdopen(handle, "rb")


def is_folder(path: Path) -> bool:
    """Whether there is a folder; no path is so long or so strange that this raises."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def irregular(path: Path) -> str | None:
    """What stands at ``path`` in the place of a regular file, as a pipe; None for a regular file, or nothing."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"cannot be read: {reason(error)}"
    return None if kind == stat.S_IFREG else f"is {_KINDS.get(kind, 'something')}, no regular file"


def reason(error: OSError | ValueError) -> str:
    """Why a file cannot be read."""
    return getattr(error, "strerror", None) or str(error)


def read_object(
    path: Path, largest: int, error: type[PeftcliError] = AdapterError, *, strict: bool = True
) -> dict[str, Any]:
    """The JSON object in a file of at most ``largest`` bytes.

    Args:
        path: the file.
        largest: bytes.
        error: what is raised.
        strict: refuse what JSON leaves open, and Python reads: a key given twice, and numbers that are none.
    """
    file = str(path)
    try:
        text = read_small(path, largest)
    except (OSError, ValueError) as failure:
        raise error(irregular(path) or f"cannot be read: {reason(failure)}", file=file) from None
    try:
        values = parse_object(text.decode("utf-8-sig"), strict=strict)
    except json.JSONDecodeError as failure:
        raise error(f"not valid JSON: {failure.msg}", file=file, line=failure.lineno) from None
    except UnicodeDecodeError as failure:
        line = text.count(b"\n", 0, failure.start) + 1
        raise error(f"not UTF-8 text: {failure.reason}", file=file, line=line) from None
    except RecursionError:
        raise error(f"not valid JSON: nested deeper than {_DEEPEST} levels", file=file) from None
    except TypeError:
        raise error("holds no JSON object", file=file) from None
    except KeyError as failure:
        raise error("is given twice", file=file, key=shown_name(failure.args[0])) from None
    except ValueError as failure:
        raise error(f"not valid JSON: {failure}", file=file) from None
    return values


def parse_object(text: str, *, strict: bool = True) -> dict[str, Any]:
    """The JSON object that a text holds.

    Raises:
        KeyError: a key is given twice. Its argument is the key.
        ValueError: it is no JSON.
        TypeError: it is no object.
        RecursionError: it is nested too deeply.
    """
    values = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number) if strict else json.loads(text)
    if not isinstance(values, dict):
        raise TypeError("no object")
    level: list[Any] = [values]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return values
    raise RecursionError


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise KeyError(next(key for key in counts if counts[key] > 1))
    return values


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")
