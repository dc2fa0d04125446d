"""Readers of text files: one JSON object per line, lists of objects in JSON, CSV. One row is in memory at a time."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from peftcli.data.dialect import NAMES, Dialect, quoting
from peftcli.data.exports import as_object
from peftcli.data.rows import Place, Row
from peftcli.errors import DataError

MAX_ROW = 64 << 20
"""Bytes of text of one row."""
_MAX_LINE = 1 << 30
"""Bytes of a line after which reading stops: a few compressed megabytes can unpack to a line of terabytes."""
CHUNK = 1 << 20
"""Bytes per read."""
_MAX_DEPTH = 100
"""Levels of lists and objects. Code that walks a row by recursion must not run out of stack."""
_TOO_LONG = f"a row of more than {MAX_ROW >> 20} MiB"
_NULS = "consists of NUL bytes: a crash or a full disk has probably damaged the file"
_BLANK = re.compile(r"[ \t\r\n]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MAX_LITERAL = len("-Infinity")


class TextFile:
    """A file that is being read, with the current row and line."""

    stream: io.BufferedReader

    def __init__(self, source: str):
        self.source = source
        self.encoding = "UTF-8"
        """Of the file; the stream is UTF-8."""
        self.number = 0
        """Number of the last row."""
        self.line = 0
        """Number of the last line; for CSV and lists, of the line on which the row starts."""

    def lines(self) -> Iterator[bytes | None]:
        """Yield the lines with their ends; None for a line that is too long, which is skipped without being kept.

        Raises:
            DataError: a line is longer than 1 GiB.
        """
        while raw := self.stream.readline(MAX_ROW + 2):
            self.line += 1
            if self.line == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if len(raw) > MAX_ROW and len(raw.rstrip(b"\r\n")) > MAX_ROW:
                skipped = len(raw)
                while raw and not raw.endswith(b"\n"):
                    raw = self.stream.readline(CHUNK)
                    skipped += len(raw)
                    if skipped > _MAX_LINE:
                        raise self.error(
                            f"a row of more than {_MAX_LINE >> 20:,} MiB; the rest of the file was not read"
                        )
                yield None
            else:
                yield raw

    def row(self, values: dict[str, Any]) -> Row:
        """Return a row on the current line."""
        return Row(values, Place(self.source, self.number, self.line))

    def error(self, message: str, *, line: int | None = None, hint: str | None = None) -> DataError:
        """Return an error about the current line, or about ``line``."""
        if message.startswith("is not UTF-8"):  # other rows may be wrong too, and be read
            hint = "Convert the file to UTF-8, or name its encoding: dataset: {encoding: cp1252}."
            message = message.replace("UTF-8", self.encoding, 1)
        return DataError(message, file=self.source, line=line or self.line, hint=hint)


def decode(raw: bytes) -> str:
    """Decode a line.

    Raises:
        ValueError: the line is not text.
    """
    if b"\0" in raw:
        raise ValueError("contains a NUL byte" if raw.strip(b"\0 \t\r\n") else _NULS)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
        raise ValueError(f"is not UTF-8: {place}") from error


def read_lines(text: TextFile) -> Iterator[Row | DataError]:
    """Read one JSON object per line."""
    parser = _Json()
    for raw in text.lines():
        if raw is None or raw.strip(b" \t\r\n"):
            text.number += 1
            yield _parse_line(raw, parser, text)


def _parse_line(raw: bytes | None, parser: _Json, text: TextFile) -> Row | DataError:
    if raw is None:
        return text.error(_TOO_LONG)
    try:
        line = decode(raw).strip(" \t\r\n")
    except ValueError as error:
        return text.error(str(error))
    try:
        value, end = parser.parse(line, 0)
        if end < len(line):
            raise json.JSONDecodeError("Text after the object", line, end)
    except (ValueError, RecursionError) as error:
        place = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        message = f"is not a JSON object: {_json_problem(error)}{place}; the line begins {quote(line)}"
        return text.error(message, hint=_line_hint(text, line))
    value = as_object(value)
    fault = parser.row_fault(value, line)
    hint = _line_hint(text, line) if isinstance(value, list) else None
    return text.error(fault, hint=hint) if fault else text.row(value)


def _line_hint(text: TextFile, line: str) -> str | None:
    if "\r" in line:
        return "This line contains a lone carriage return (\\r): lines end in \\n or \\r\\n."
    if line.startswith("\ufeff"):
        return "This line begins with a byte order mark, as where files were joined: remove it."
    if text.number == 1 and line.startswith(("[", "{")):
        return "A .jsonl file contains one object per line; a .json file contains that, or one list of objects."
    return None


class _Json:
    """A JSON parser that also records what the grammar allows but a dataset must not contain."""

    def __init__(self) -> None:
        self._faults: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def parse(self, text: str, start: int) -> tuple[Any, int]:
        """Parse the value that starts at a position; return it with its end."""
        self._faults.clear()
        return self._decoder.raw_decode(text, start)

    def row_fault(self, value: Any, text: str) -> str | None:
        """Say why the value parsed last, from ``text``, is not a row; None if it is one."""
        if not isinstance(value, dict):
            return f"expected a JSON object, found {json_kind(value)}: {quote(text)}"
        return self.fault(value, text)

    def fault(self, value: Any, text: str) -> str | None:
        """Say what the value parsed last, from ``text``, contains that a dataset must not; None if nothing."""
        if self._faults:
            return self._faults[0]
        if text.count("{") + text.count("[") > _MAX_DEPTH and _is_deep(value, _MAX_DEPTH):
            return f"nested too deeply: more than {_MAX_DEPTH} levels"
        if _SURROGATE.search(text):
            try:
                json.dumps(value, ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError:
                return "contains half of a surrogate pair (\\ud800-\\udfff)"
        return None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            self._faults.append(f"the key {quote(first_duplicate(key for key, _ in pairs))} occurs twice in one object")
        return found

    def _constant(self, name: str) -> None:
        self._faults.append(f"{name} is not JSON")

    def _float(self, digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            self._faults.append(f"{quote(digits)} is too large for a number")
        return value


def parse_json(text: str) -> tuple[Any, str | None]:
    """Parse a value of a row that is JSON; return it with what it contains that a dataset must not, or None.

    Raises:
        ValueError: the text is not JSON.
    """
    parser, text = _Json(), text.strip(" \t\r\n")
    try:
        value, end = parser.parse(text, 0)
    except RecursionError as error:
        raise ValueError(first_line(error)) from error
    if end < len(text):
        raise json.JSONDecodeError("Text after the value", text, end)
    return value, parser.fault(value, text)


def _is_deep(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inner) and (levels == 0 or any(_is_deep(each, levels - 1) for each in inner))


def _json_problem(error: Exception) -> str:
    """Return the message of the JSON parser, without the position."""
    return error.msg.rstrip(": ").removesuffix(" at") if isinstance(error, json.JSONDecodeError) else first_line(error)


class JsonStream:
    """The text of a JSON file, of which one part is in memory at a time."""

    def __init__(self, text: TextFile):
        self._text, self._parser = text, _Json()
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._buffer, self._at, self._ended = "", 0, False
        text.line = 1  # of self._at

    def rows(self) -> Iterator[Row | DataError]:
        """Yield the objects of a file that is one list."""
        self._next_char()
        before = 0
        for value, fault in self._items():
            self._text.number += 1
            # Of several rows on one line, the line finds only the first.
            line = self._text.line if self._text.line > before else None
            before = self._text.line
            place = Place(self._text.source, self._text.number, line)
            yield place.error(fault) if fault else Row(value, place)
        self._end("list")

    def member(self, name: str) -> Iterator[tuple[Any, str | None]]:
        """Yield the items of a list in a file that is one object; with each, why it is not an object, or None.

        ``name`` must be the name of a list. Other members are skipped.
        """
        found = False
        self._next_char()
        self._advance(self._at + 1)  # over the opening brace
        while self._next_char() != "}":
            key = self._skip_value()
            if not isinstance(key, str) or self._next_char() != ":":
                raise self._text.error(f"is not JSON: expected a name and ':', found {self._near(self._at)}")
            self._advance(self._at + 1)
            self._next_char()
            if key == name and found:
                raise self._text.error(f"the key {quote(name)} occurs twice in one object")
            if key == name:
                found = True
                yield from self._items()
            else:
                self._skip_value()
            self._next_item("}")
        self._end("object")

    def _items(self) -> Iterator[tuple[Any, str | None]]:
        """Yield the items of the list that starts here; with each, why it is not an object, or None."""
        self._advance(self._at + 1)  # over the opening bracket
        while self._next_char() != "]":
            value, end = self._parse_value()
            taken, value = self._buffer[self._at : end], as_object(value)
            yield value, _escaped_byte(taken) or self._parser.row_fault(value, taken)
            self._advance(end)
            self._next_item("]")
        self._advance(self._at + 1)

    def _skip_value(self) -> Any:
        value, end = self._parse_value()
        self._advance(end)
        return value

    def _next_item(self, closing: str) -> None:
        """Move over the comma before the next item, or to the closing bracket."""
        mark = self._next_char()
        if mark == ",":
            self._advance(self._at + 1)
            if self._next_char() == closing:
                raise self._text.error(f"is not JSON: a comma before the closing {closing!r}")
        elif mark != closing:
            raise self._text.error(f"is not JSON: expected ',' or {closing!r}, found {self._near(self._at)}")

    def _end(self, kind: str) -> None:
        """Move over the closing bracket, after which there must be nothing."""
        self._advance(self._at + 1)
        if self._next_char():
            raise self._text.error(f"text after the end of the {kind}: {self._near(self._at)}")

    def _next_char(self) -> str:
        """Skip white space and return the next character; an empty string at the end."""
        while True:
            blank = _BLANK.match(self._buffer, self._at)
            self._advance(blank.end() if blank else self._at)
            if self._at < len(self._buffer) or not self._grow():
                if self._buffer[self._at : self._at + 1] == "\0":
                    raise self._text.error(_NULS)
                return self._buffer[self._at : self._at + 1]

    def _parse_value(self) -> tuple[Any, int]:
        """Parse the value at the current position; return it with its end."""
        while True:
            try:
                value, end = self._parser.parse(self._buffer, self._at)
                if end + 2 < len(self._buffer) or not self._grow():  # 1.5 may continue as 1.5e+3
                    return value, end
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos > len(self._buffer) - _MAX_LITERAL
                if not (cut_off and self._grow()):
                    raise self._error(error, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self._error(error, self._at) from error

    def _error(self, error: Exception, at: int) -> DataError:
        line = self._text.line + self._buffer.count("\n", self._at, at)
        fault = (
            _escaped_byte(self._buffer[at : at + 1]) or f"is not JSON: {_json_problem(error)}; near {self._near(at)}"
        )
        return self._text.error(fault, line=line)

    def _near(self, at: int) -> str:
        return quote(self._buffer[at : at + 100])

    def _advance(self, end: int) -> None:
        self._text.line += self._buffer.count("\n", self._at, end)
        self._at = end

    def _grow(self) -> bool:
        """Read more text: twice as much each time, so that a long value is parsed only a few times."""
        held = len(self._buffer) - self._at
        if held > MAX_ROW:
            raise self._text.error(_TOO_LONG)
        raw = b"" if self._ended else self._text.stream.read(max(CHUNK, held))
        if raw:
            self._buffer, self._at = self._buffer[self._at :] + self._decode(raw), 0
        elif not self._ended:
            self._buffer, self._ended = self._buffer + self._decode(b"", True), True
        return bool(raw)


def _escaped_byte(text: str) -> str | None:
    """Describe the first byte that was not UTF-8 when the text was decoded; None if there is none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"is not UTF-8: byte 0x{ord(text[error.start]) & 0xFF:02x} in {quote(text)}"
    return None


def read_csv(text: TextFile, dialect: Dialect) -> Iterator[Row | DataError]:
    """Read a header, unless the dialect names the columns, then one row per record. Fields stay text."""
    csv.field_size_limit(2 * MAX_ROW)
    lines = _CsvLines(text)
    reader = csv.reader(lines, strict=True, delimiter=dialect.delimiter, quoting=quoting(dialect.quoted))
    header: list[str] | None = list(dialect.columns) or None
    while True:
        start = reader.line_num + 1
        lines.size, lines.fault = 0, None
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise text.error(f"is not CSV: {first_line(error)}; the row starts here", line=start) from error
        text.line = start
        if record is None:
            return
        if header is None and (record or lines.fault):
            if lines.fault:
                raise text.error(lines.fault)
            header = _header(record, text, dialect.delimiter)
        elif record or lines.fault:
            text.number += 1
            yield text.error(lines.fault) if lines.fault else _record(header or [], record, text, dialect.delimiter)


class _CsvLines:
    """The lines of a CSV file as the csv module needs them: a line break only at the end."""

    def __init__(self, text: TextFile):
        self._text = text
        self.size = 0
        """Bytes of the current record."""
        self.fault: str | None = None
        """The first problem in the text of the current record."""

    def __iter__(self) -> Iterator[str]:
        for raw in self._text.lines():
            self.size += len(raw or ())
            if raw is None or self.size > MAX_ROW:
                raise csv.Error(f"{_TOO_LONG}, perhaps a quote that is not closed")
            for piece in raw.splitlines(keepends=True):
                try:
                    yield decode(piece)
                except ValueError as error:
                    self.fault = self.fault or str(error)
                    yield piece.replace(b"\0", b"").decode("utf-8", "replace")


def _record(header: list[str], record: list[str], text: TextFile, delimiter: str) -> Row | DataError:
    if len(record) == len(header):
        return text.row({name: value for name, value in zip(header, record, strict=True) if name})
    message = f"{len(record)} fields, but the header has {len(header)}: {quote(delimiter.join(record))}"
    return text.error(message, hint=f"Put fields that hold {NAMES.get(delimiter, repr(delimiter))} in double quotes.")


def _header(record: list[str], text: TextFile, delimiter: str) -> list[str]:
    """The names of the columns; a first of several without a name, as pandas writes its index, is not read."""
    names = [name.strip() for name in record]
    if "" in (names[1:] or names):
        hint = "Give it a name, or remove it."
        raise text.error(f"column {names.index('', len(names) > 1) + 1} of the header has no name", hint=hint)
    if len(set(names)) < len(names):
        raise text.error(f"the header names {quote(first_duplicate(names))} twice")
    if len(names) == 1 and (found := next((mark for mark in ",;\t|" if mark in names[0]), None)):
        used = NAMES.get(delimiter, repr(delimiter))
        message = f"one column, {quote(names[0])}: fields are separated by {used}, not by {found!r}"
        raise text.error(message, hint=f"Name the delimiter: dataset: {{delimiter: {json.dumps(found)}}}.")
    return names


def json_kind(value: Any) -> str:
    """Name the kind of a value in a row."""
    names = {list: "a list", dict: "an object", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def quote(text: str, length: int = 60) -> str:
    """Quote at most ``length`` characters of untrusted text, escaped."""
    return repr(text if len(text) <= length else text[:length] + "...")


def first_line(error: BaseException | str, length: int = 160) -> str:
    """Return the first line of another library's message, without control characters."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().split("\n")[0]
    text = "".join(mark if mark.isprintable() else "?" for mark in text)
    return text if len(text) <= length else text[:length] + "..."


def first_duplicate(names: Iterable[str]) -> str:
    """Return the first name that occurs more than once."""
    return next(name for name, count in Counter(names).items() if count > 1)
