"""Safe reading of untrusted files: regular files only, opened once, with a size limit. No torch here."""

from __future__ import annotations

import json
import os
import reprlib
import shlex
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from peftcli.errors import AdapterError, PeftcliError

_MAX_DEPTH = 64
_MAX_MESSAGE, _MAX_NAME = 600, 160
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80
_repr.maxlist = _repr.maxdict = 4
_repr.maxlevel = 3


def read_small(path: Path, limit: int) -> bytes:
    """Read a regular file of at most ``limit`` bytes; never wait for a pipe or device.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a regular file, or is larger.
    """
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise ValueError(f"it has {size:,} bytes, and at most {limit:,} are read")
        return file.read(limit)


def short_repr(value: object) -> str:
    """Return an untrusted value for a message: short, on one line, without terminal control characters."""
    try:
        return _repr.repr(value)
    except ValueError:  # Python shows no number of more than 4300 digits
        return "a number of thousands of digits"


def short_name(name: str) -> str:
    """Return an untrusted name for a message: as it is while it is short and printable, else as ``short_repr`` does."""
    return name if name.isprintable() and len(name) <= _MAX_NAME else short_repr(name)


def command_word(path: Path | str) -> str:
    """Return a path as a word of a command to suggest: quoted for the shell, and not to be taken for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def one_line(text: str) -> str:
    """Return a message with untrusted parts on one line, no longer than a paragraph."""
    text = "".join(char if char.isprintable() else escape_char(char) for char in text[: _MAX_MESSAGE + 1])
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]} ..."


def first_of(items: Sequence[str], most: int = 4) -> list[str]:
    """Return the items as a message lists them, at most this many: of more, the last entry counts those left out."""
    if len(items) <= most:
        return list(items)
    return [*items[: most - 1], f"and {len(items) - most + 1} more"]


def escape_char(char: str) -> str:
    r"""Return a character as Python writes it in ASCII, as ``\x1b``."""
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def is_harmless(char: str) -> bool:
    """Return whether a character controls neither a terminal nor the direction of a text."""
    # Cc, Cf, Cs: control, formatting (such as right-to-left overrides), surrogates; Zl, Zp: line and paragraph
    # separators. Ordinary text contains the zero-width joiners.
    return char in "\u200c\u200d" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; never wait for or read a pipe or device.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not a regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind != stat.S_IFREG:
        os.close(handle)
        raise ValueError(f"it is {_KINDS.get(kind, 'something')}, not a regular file")
    return os.fdopen(handle, "rb")


def is_folder(path: Path) -> bool:
    """Return whether the path is a folder; False, unlike ``Path.is_dir``, for paths that the system refuses."""
    return os.path.isdir(path)  # noqa: PTH112


def is_file(path: Path) -> bool:
    """Return whether the path is a regular file, False for paths that the system refuses."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def irregular_kind(path: Path) -> str | None:
    """Say what is at ``path`` if it is not a regular file, as "is a pipe"; None for a regular file, or no file."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"cannot be read: {os_reason(error)}"
    return None if kind == stat.S_IFREG else f"is {_KINDS.get(kind, 'something')}, not a regular file"


def os_reason(error: Exception) -> str:
    """Return the system's reason why a file cannot be read."""
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def read_errors(path: Path, error: type[PeftcliError] = AdapterError, *, hint: str | None = None) -> Iterator[None]:
    """Inside, a file that cannot be opened, read or parsed raises ``error``."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as failure:
        message = irregular_kind(path) or f"cannot be read: {os_reason(failure)}"
        raise error(message, file=str(path), hint=hint) from None


def read_json_object(
    path: Path,
    largest: int,
    error: type[PeftcliError] = AdapterError,
    *,
    strict: bool = True,
    hint: str | None = None,
) -> dict[str, Any]:
    """Read the JSON object in a file of at most ``largest`` bytes; raise ``error`` if there is none.

    ``strict`` refuses what JSON leaves open and Python accepts: duplicate keys, NaN and Infinity. ``hint`` is that of
    the error.
    """
    with read_errors(path, error, hint=hint):
        text = read_small(path, largest)
    line = key = None
    try:
        return parse_json_object(text.decode("utf-8-sig"), strict=strict)
    except json.JSONDecodeError as failure:
        message, line = (f"not valid JSON: {failure.msg}", failure.lineno) if text.strip() else ("is empty", None)
    except UnicodeDecodeError as failure:
        message, line = f"not UTF-8 text: {failure.reason}", text.count(b"\n", 0, failure.start) + 1
    except RecursionError:
        message = f"not valid JSON: nested deeper than {_MAX_DEPTH} levels"
    except TypeError:
        message = "holds no JSON object"
    except KeyError as failure:
        message, key = "is given twice", short_name(failure.args[0])
    except ValueError as failure:
        message = f"not valid JSON: {failure}"
    raise error(message, file=str(path), line=line, key=key, hint=hint)


def parse_json_object(text: str, *, strict: bool = True) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        KeyError: a key is given twice; the argument is the key.
        ValueError: the text is not JSON.
        TypeError: the value is not an object.
        RecursionError: the value is nested too deeply.
    """
    values = (
        json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
        if strict
        else json.loads(text)
    )
    if not isinstance(values, dict):
        raise TypeError("no object")
    level: list[Any] = [values]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return values
    raise RecursionError


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise KeyError(next(key for key in counts if counts[key] > 1))
    return values


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number")
