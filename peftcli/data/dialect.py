"""The encoding of a text file and the delimiter of its fields, found from its bytes."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

UTF8 = "utf-8"
_FALLBACK = "cp1252"
"""Excel's encoding for western languages."""
_HEAD = 1 << 17
"""Bytes from which the delimiter is found."""
_MOST = 256 << 20
"""Bytes from which the encoding is found."""
_RECORDS = 500
_DELIMITERS = (",", ";", "\t", "|")
"""Delimiters that are looked for, the likeliest first."""
_ENOUGH = 0.9
"""Share of the records with as many fields as the header from which a delimiter is believed."""
_BAD_BYTES = re.compile("[\udc80-\udcff]")
_GOOD = re.compile("[^\x00-\x7f\udc80-\udcff]")
_CERTAIN = 10_000
"""Characters that are not ASCII after which the rest of a file is not looked at."""
_UNDEFINED = {0xDC81, 0xDC8D, 0xDC8F, 0xDC90, 0xDC9D}
"""Bytes that cp1252 has no character for, as ``surrogateescape`` decodes them."""
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
NAMES = {"\t": "tabs", ",": "commas"}
"""Delimiter -> its name in messages."""


@dataclass(frozen=True)
class Dialect:
    """How the text of a file is to be read."""

    encoding: str = UTF8
    delimiter: str = ","
    """Between fields; of CSV and TSV files."""
    quoted: bool = True
    """Whether fields may be in double quotes."""
    columns: tuple[str, ...] = ()
    """The names of the columns of a file without a header."""
    form: str = ""
    """What a line of a .txt file is; empty: a text."""

    def described(self) -> str | None:
        """Return what the user should know; None for UTF-8 with commas and a header, or with a text a line."""
        found = [f"the encoding {self.encoding}"] if self.encoding != UTF8 else []
        if self.delimiter != ",":
            found.append(f"fields separated by {NAMES.get(self.delimiter, repr(self.delimiter))}")
        if self.columns:
            found.append(f"no header: the columns are called {', '.join(self.columns)}")
        found += [self.form] if self.form else []
        return f"found {' and '.join(found)}" if found else None


def is_encoding(name: str) -> bool:
    """Return whether Python knows an encoding of text by this name."""
    try:
        return "".encode(name) is not None and hasattr(codecs.lookup(name).incrementaldecoder, "decode")
    except (LookupError, ValueError, UnicodeError):
        return False


def quoting(quoted: bool) -> Literal[0, 3]:
    """Return the csv module's constant."""
    return csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE


class Recoded(io.RawIOBase):
    """A stream in another encoding, read as UTF-8.

    Bytes that are not text stay as they are, so that the reader of the lines finds them.
    """

    def __init__(self, stream: io.BufferedIOBase, encoding: str):
        self._stream, self._rest, self._ended = stream, b"", False
        errors = "surrogatepass" if encoding.lower().startswith(("utf-16", "utf-32")) else "surrogateescape"
        self._errors = errors
        self._decoder = codecs.getincrementaldecoder(encoding)(errors)

    def readable(self) -> bool:
        """Return true."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with the next bytes; return their number."""
        while not self._rest and not self._ended:
            raw = self._stream.read(_HEAD)
            self._ended = not raw
            try:
                text = self._decoder.decode(raw, self._ended)
            except UnicodeDecodeError as error:
                raise OSError(f"is not {error.encoding}: {error.reason}") from error
            self._rest = text.encode(UTF8, self._errors)
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rest = self._rest[len(taken) :]
        return len(taken)


def find_encoding(stream: io.BufferedReader, *, whole: bool) -> str:
    """Find the encoding: by a byte order mark or NUL bytes, else UTF-8, else cp1252.

    Text whose bytes are mostly UTF-8 is damaged UTF-8. ``whole``: look beyond the first bytes.
    """
    head = stream.peek(4)[:64]
    if known := next((name for mark, name in _BOMS.items() if head.startswith(mark)), None):
        return known
    if len(head) > 3 and any(head[:4]) and b"\0\0" in (head[0:4:2], head[1:4:2]):
        return "utf-16-be" if head[0:4:2] == b"\0\0" else "utf-16-le"
    decoder = codecs.getincrementaldecoder(UTF8)("surrogateescape")
    good, bad, read = 0, Counter[int](), 0
    while whole and read < _MOST and (raw := stream.read(_HEAD)):
        read += len(raw)
        if raw.isascii() and not decoder.getstate()[0]:
            continue
        text = decoder.decode(raw)
        bad.update(map(ord, _BAD_BYTES.findall(text)))
        good += len(_GOOD.findall(text))
        if (bad.total() > _CERTAIN and not good) or (good > _CERTAIN and not bad):
            break
    is_western = bad.total() > 20 * good and not _UNDEFINED & bad.keys()
    return _FALLBACK if is_western else UTF8


def find_delimiter(stream: io.BufferedReader, given: str | None, default: str) -> Dialect:
    """Find the delimiter of the fields from the beginning of a file, and whether fields are quoted.

    ``default`` stays if it fits, or if no other one does. The stream is UTF-8.
    """
    head = stream.read(_HEAD)
    parts = head.removeprefix(codecs.BOM_UTF8).splitlines(keepends=True)
    is_cut = len(head) == _HEAD
    lines = [part.replace(b"\0", b"").decode(UTF8, "replace") for part in parts[: len(parts) - is_cut or 1]]
    candidates = [given] if given else [default, *(mark for mark in _DELIMITERS if mark != default)]
    shares = {mark: _share(_records(lines, mark, quoted=True), is_cut=is_cut) for mark in candidates}
    enough = [mark for mark in candidates if shares[mark] >= _ENOUGH]
    delimiter = enough[0] if enough else candidates[0]
    quoted = delimiter == "," or not _is_plain(lines, delimiter)
    if not enough and not given:
        plain = [mark for mark in candidates if mark != "," and _is_plain(lines, mark)]
        delimiter, quoted = (plain[0], False) if plain else (delimiter, True)
    records = _records(lines, delimiter, quoted=quoted)
    return Dialect(delimiter=delimiter, quoted=quoted, columns=_names_without_header(records))


def _records(lines: Sequence[str], delimiter: str, *, quoted: bool) -> list[list[str]]:
    csv.field_size_limit(_MOST)
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting(quoted))
    found = list[list[str]]()
    try:
        found.extend(islice(filter(None, reader), _RECORDS))
    except csv.Error:
        return found
    return found


def _share(records: Sequence[Sequence[str]], *, is_cut: bool) -> float:
    """The share of the records with as many fields as the header; 0 for a header of one field.

    ``is_cut``: the last one may not be whole.
    """
    records = records[:-1] if is_cut and len(records) > 1 else records
    if not records or len(records[0]) < 2:
        return 0
    return sum(len(each) == len(records[0]) for each in records) / len(records)


def _is_plain(lines: Sequence[str], delimiter: str) -> bool:
    """Whether all lines have as many fields, of which one begins with a quote that does not close it."""
    counts = {line.count(delimiter) for line in lines if line.strip("\r\n")}
    if len(counts) != 1 or counts == {0}:
        return False
    fields = (field for line in lines for field in line.rstrip("\r\n").split(delimiter))
    return any(field.startswith('"') and not _QUOTED.fullmatch(field) for field in fields)


def _names_without_header(records: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Names for the columns of a file whose first record is a row: a value of it comes again in its column.

    Empty if the first record is a header, which may be the numbers of the columns.
    """
    if len(records) < 5 or len(records[0]) < 2:
        return ()
    numbered = records[0][not records[0][0] :]  # after the index, whose name pandas leaves empty
    if numbered == [str(at) for at in range(len(numbered))]:
        return ()
    first, others = records[0], [each for each in records[1:] if each != records[0] and len(each) == len(records[0])]
    again = [sum(each[at] == first[at] for each in others) for at in range(len(first))]
    repeated = [at for at, count in enumerate(again) if count > 2 and first[at].strip()]
    if not repeated:
        return ()
    if len(first) == 2 and len(repeated) == 1:
        return ("label", "text") if repeated == [0] else ("text", "label")
    return tuple(f"column_{at}" for at in range(1, len(first) + 1))
