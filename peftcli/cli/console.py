"""What the commands print. stdout is the answer, stderr is the log. Secrets are in neither.

The only user of rich, and only on a terminal: elsewhere plain lines without colours.
"""

from __future__ import annotations

import json
import math
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, cast

from peftcli.errors import PeftcliError
from peftcli.system.secrets import redact, redact_values

if TYPE_CHECKING:
    from rich.console import Console

_LONGEST_CELL = 200
_json_printed = False


def out(text: str = "") -> None:
    """A line of the answer."""
    _write(sys.stdout, text)


def log(text: str) -> None:
    """A line of the log. Where nobody reads it any more, the work goes on."""
    try:
        _write(sys.stderr, text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def print_json(data: Any) -> None:
    """The answer as one JSON object: NaN and Inf become null, anything that is not JSON its string."""
    global _json_printed
    _json_printed = True
    _write(sys.stdout, json.dumps(redact_values(_finite(data)), indent=2, default=str, allow_nan=False))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table of the answer. A long cell before the last column is cut, since all there are padded to the widest."""
    cells = [[clean(str(cell)) for cell in row] for row in rows]
    cells = [[*map(_cut, row[:-1]), *row[-1:]] for row in cells]
    if is_terminal(sys.stdout):
        from rich.table import Table
        from rich.text import Text

        drawn = Table(*columns, box=None, pad_edge=False, header_style="bold")
        for row in cells:
            drawn.add_row(*(Text(cell) for cell in row))
        rich_console().print(drawn)
        return
    widths = [max(len(line[index]) for line in [columns, *cells]) for index in range(len(columns))]
    for line in [columns, *cells]:
        out("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def rich_console(stderr: bool = False) -> Console:
    """The console of rich, for a display that needs a terminal."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def is_terminal(stream: TextIO) -> bool:
    """Whether ``stream`` shows colours and redraws."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


@contextmanager
def guarded() -> Iterator[None]:
    """Inside, what other libraries write to stdout and stderr by themselves holds no secret either."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Guarded(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def clean(text: str) -> str:
    r"""``text`` without secrets, and with everything that could steer a terminal written out, as ``\x1b``."""
    return escaped(redact(text))


def escaped(text: str) -> str:
    """As ``clean``, of a part of a text that is known to hold no secret."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in "\n\t" or _is_harmless(char) else _escape(char) for char in text)


def report_error(error: PeftcliError, as_json: bool = False) -> int:
    """Prints an error, and with ``as_json`` the one JSON object if none was printed yet. Returns the exit code."""
    log(f"error: {error}")
    if as_json and not _json_printed:
        print_json({"error": {**error.as_dict(), "exit_code": error.exit_code}})
    return error.exit_code


class _Guarded:
    """A text stream that takes the secrets out of what is written to it."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _cut(cell: str) -> str:
    return cell if len(cell) <= _LONGEST_CELL else f"{cell[: _LONGEST_CELL - 3]}..."


def _write(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "utf-8"
    stream.write(clean(text).encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


def _is_harmless(char: str) -> bool:
    # Cc, Cf, Cs, Co, Cn: control, formatting (as right-to-left overrides), surrogates, private, unassigned;
    # Zl, Zp: line and paragraph separators. The zero-width joiners are part of ordinary writing.
    return char in "\u200c\u200d" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escape(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    return [_finite(item) for item in data] if isinstance(data, (list, tuple)) else data
