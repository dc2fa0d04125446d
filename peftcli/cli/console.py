"""Print the output of commands: the answer on stdout, the log on stderr, without secrets.

Uses rich on terminals only; elsewhere, plain lines without colours.
"""

from __future__ import annotations

import codecs
import json
import logging
import math
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO, cast

from peftcli.errors import PeftcliError, PeftWarning, StorageError
from peftcli.guard.files import escape_char, is_harmless
from peftcli.system.outputs import StdoutClosed
from peftcli.system.secrets import redact, redact_values, safe_length

if TYPE_CHECKING:
    from rich.console import Console

_MAX_CELL = 200
_COLOURS = {"error": "1;31", "warning": "33", "verified": "32", "ok": "32"}
"""First word of a line -> its colour on a terminal."""
_COMMAND = re.compile(r"(^|[:`] ?)\s*peftcli ")
"""A command in a line, which is copied as a whole."""
_MARKED = re.compile(rf"(\[[^\]]*\] )?({'|'.join(_COLOURS)})(?=[: ])")
_USUAL_FORM = warnings.formatwarning
json_printed = False
"""Whether the command's answer is out: an error comes after it then, and not in its place."""


def out(text: str = "") -> None:
    """Print a line of the answer."""
    _write(sys.stdout, text)


def log(text: str) -> None:
    """Print a line of the log. Do not fail if nobody reads stderr, or its disk is full."""
    try:
        _write(sys.stderr, text, marked=True)
    except OSError:
        discard(sys.stderr)


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a Python warning as stderr gets it: peftcli's own as a command's other ones, without its line of code."""
    if issubclass(category, PeftWarning):
        return _coloured(f"warning: {message}\n", sys.stderr)
    return _USUAL_FORM(message, category, filename, lineno, line)


def open_closed_streams() -> None:
    """Discard what is written to a stream that was closed from the start: a file opened later would get its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))


def discard(stream: TextIO) -> None:
    """Write nothing more to a stream that cannot be written: Python would try so again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def paragraph(text: str, before: str = "") -> None:
    """Print a text of the answer after ``before``: on a terminal in lines that fit below one another, else on one.

    On a terminal its first word is coloured, if it says how good something is.
    """
    _write(sys.stdout, _fitted(text, sys.stdout, before), marked=True)


def _fitted(text: str, stream: TextIO, before: str = "") -> str:
    """Break the lines of a text between words where a terminal would break them anywhere. Commands stay whole."""
    if not is_terminal(stream):
        return before + text
    after = " " * len(before)
    fit = partial(
        textwrap.fill,
        width=shutil.get_terminal_size().columns,
        subsequent_indent=after,
        break_long_words=False,
        break_on_hyphens=False,
    )
    first, *others = text.split("\n")
    lines = [before + first, *(after + line for line in others)]
    return "\n".join(line if _COMMAND.search(line) else fit(line) for line in lines)


def folder_once(paths: Sequence[str], most: int = 10) -> str:
    """Return a list of paths, or of places in files, in words; the folder of all of them is named once."""
    if len(paths) > most:
        return f"{folder_once(paths[:most])} and {len(paths) - most:,} more"
    folders = {path.rpartition("/")[0] for path in paths}
    folder = min(folders, default="")
    if len(paths) < 2 or len(folders) > 1 or not os.path.isdir(folder):  # noqa: PTH112 (a text, not a path)
        return ", ".join(paths)
    return f"{folder}/: {', '.join(path.rpartition('/')[2] for path in paths)}"


def print_json(data: Any) -> None:
    """Print the answer as one JSON object, on several lines."""
    global json_printed
    json_printed = True
    out(json_text(data, indent=2))


def json_text(data: Any, indent: int | None = None) -> str:
    r"""Return JSON for stdout: NaN and Inf become null, other values that are not JSON become strings.

    A character that could control a terminal, or any but ASCII where stdout is not UTF-8, is escaped, as ``\u202e``.
    """
    in_ascii, values = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8", redact_values(_finite(data))
    text = json.dumps(values, indent=indent, default=str, allow_nan=False, ensure_ascii=in_ascii)
    return "".join(char if char == "\n" or is_harmless(char) else json.dumps(char)[1:-1] for char in text)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table of the answer. Long cells are shortened, except in the last column, which is not padded."""
    cells = [[clean(str(cell)) for cell in row] for row in rows]
    cells = [[*map(shorten, row[:-1]), *row[-1:]] for row in cells]
    if is_terminal(sys.stdout):
        from rich.table import Column, Table
        from rich.text import Text

        folded = (Column(name, overflow="fold") for name in columns)  # else what does not fit is cut
        drawn = Table(*folded, box=None, pad_edge=False, header_style="bold")
        for row in cells:
            drawn.add_row(*(Text(cell) for cell in row))
        rich_console().print(drawn)
        return
    widths = [max(len(line[index]) for line in [columns, *cells]) for index in range(len(columns))]
    for line in [columns, *cells]:
        out("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def markdown(text: str, width: int = 80) -> None:
    """Draw a Markdown page of the answer on a terminal, its front matter above it as it is written."""
    from rich.markdown import Markdown
    from rich.text import Text

    head, mark, body = clean(text).partition("\n---\n")
    drawn, width = rich_console(), min(width, rich_console().width)
    if text.startswith("---\n") and mark:
        drawn.print(Text(head.removeprefix("---\n"), style="dim"), width=width)
    drawn.print(Markdown(body if mark else head, hyperlinks=False), width=width)
    drawn.print()


def rich_console(stderr: bool = False) -> Console:
    """Return a console of rich, for output that needs a terminal."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


@contextmanager
def redrawn() -> Iterator[Callable[[str], None]]:
    """Yield a function that draws a text of the answer over the one before, on a terminal; at the end it is gone."""
    from rich.live import Live
    from rich.text import Text

    with Live(console=rich_console(), auto_refresh=False, transient=True) as live:
        yield lambda text: live.update(Text(clean(text)), refresh=True)


def is_terminal(stream: TextIO) -> bool:
    """Return whether ``stream`` is a terminal that can show colours and redraw lines."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


@contextmanager
def redacted_streams() -> Iterator[None]:
    """Remove secrets from what other libraries write to stdout and stderr in the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(TextIO, _RedactedAnswer(sys.stdout)), cast(TextIO, _RedactedStream(sys.stderr))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def debug_log() -> Iterator[None]:
    """Log in the block, on stderr, what our own modules say at the level DEBUG."""
    logger, handler = logging.getLogger("peftcli"), _DebugHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def clean(text: str) -> str:
    r"""Remove secrets from ``text``, and escape everything that could control a terminal, as ``\x1b``."""
    return escape(redact(text))


def escape(text: str) -> str:
    """Escape everything that could control a terminal, in a text without secrets."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in "\n\t" or is_harmless(char) else escape_char(char) for char in text)


def more_about(error: PeftcliError) -> str:
    """Return the line that names what says more of an error; empty without such a name."""
    with suppress(Exception):  # whatever fails here, the error itself is shown
        from peftcli.recipe import help_on

        if name := help_on(error):
            return f"more: peftcli explain {name}"
    return ""


def report_error(error: PeftcliError, as_json: bool) -> int:
    """Print an error, with ``as_json`` also as the JSON object if none was printed yet; return the exit code."""
    more = more_about(error)
    log(_fitted(f"error: {error}" + (f"\n{more}" if more else ""), sys.stderr))
    if as_json and not json_printed:
        try:
            print_json({"error": {**error.as_dict(), "exit_code": error.exit_code}})
        except OSError:
            discard(sys.stdout)
    return error.exit_code


class _DebugHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        log(self.format(record))


class _RedactedStream:
    """A text stream that removes secrets from what is written to it, and escapes what it cannot encode."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(_encodable(redact(text), self._stream))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _RedactedAnswer(_RedactedStream):
    """The same for stdout: an error of writing says that it is standard output's."""

    def write(self, text: str) -> int:
        with _stdout_errors():
            return super().write(text)

    def flush(self) -> None:
        with _stdout_errors():
            self._stream.flush()


@contextmanager
def _stdout_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        discard(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise StdoutClosed from None
        raise StorageError(f"cannot be written: {error.strerror}", file="standard output") from None


def shorten(cell: str, most: int = _MAX_CELL) -> str:
    """Shorten a value to fit on a line; ``--json`` prints it whole."""
    return cell if len(cell) <= most else f"{cell[: most - 3]}..."


def format_size(count: int) -> str:
    """Return a number of bytes with a unit that suits it: 632 bytes, 19.6 MB."""
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"


def _write(stream: TextIO, text: str, *, marked: bool = False) -> None:
    text = _encodable(clean(text), stream)
    stream.write((_coloured(text, stream) if marked else text) + "\n")
    stream.flush()


def _coloured(text: str, stream: TextIO) -> str:
    """Colour the first word of a text without escapes, on a terminal."""
    if not is_terminal(stream) or not (found := _MARKED.match(text)):
        return text
    return f"{found[1] or ''}\x1b[{_COLOURS[found[2]]}m{found[2]}\x1b[0m{text[found.end() :]}"


def _encodable(text: str, stream: TextIO) -> str:
    """Escape the characters that the encoding of ``stream`` does not contain."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    return [_finite(item) for item in data] if isinstance(data, (list, tuple)) else data


def is_text(text: str) -> bool:
    """Return whether the text was UTF-8 before Python decoded it."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


@contextmanager
def streamed_output() -> Iterator[Callable[[str], None]]:
    """Yield a function that prints growing text, and holds back what may become a secret."""
    held = ""

    def write(text: str) -> None:
        nonlocal held
        held += text
        end = safe_length(held)
        sys.stdout.write(clean(held[:end]))
        sys.stdout.flush()
        held = held[end:]

    yield write
    out(held)
