"""Reads the rows of one file: .jsonl, .json, .csv or .parquet, also compressed. Strict, and in bounded memory.

A row that is wrong gives an error in its place, and the reader goes on where it can tell where the next row begins.
What leaves that open, as an unclosed quote in CSV or a stream that is cut off, ends the file with an error.
"""

from __future__ import annotations

import codecs
import gzip
import io
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from peftcli.data.rows import Place, Row
from peftcli.data.text_rows import CHUNK, JsonList, Text, cut, read_csv, read_lines, reason, repeated
from peftcli.errors import DataError

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")
"""Files that can be read."""
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
"""What may stand behind an extension, as in ``a.jsonl.gz``."""
ACCEPTED = f"Files that can be read: {', '.join(EXTENSIONS)}, each also with {' or '.join(COMPRESSED)} behind it."
"""For hints."""

_PARQUET_BATCH = 64
"""Rows held at once. A row may be large."""
_LARGEST_BATCH = 256 << 20
"""Bytes that the texts of one column may take then."""
_LARGEST_TEXT = 40_000_000
"""Bytes of a text of a table. None that can be trained has as many."""
_DICTIONARY_PAGE, _NEXT_INT32 = 2, 0x15

_CONTENT = {
    b"PAR1\x15": "parquet",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "a .zip or .xlsx file",
    b"BZh9": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"ARROW1\0\0": "an Arrow file",
    b"SQLite format 3\0": "an SQLite database",
    b"%PDF-": "a PDF",
    b"<!DOCTYPE html": "a web page",
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"version https://git-lfs": "a Git LFS pointer; git lfs pull fetches the data",
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""First bytes of a file -> what it is, for one whose name says something else."""


def kind_of(name: str) -> tuple[str, str] | None:
    """Extension and compression of a file name, as in ``(".jsonl", ".gz")``; None where it cannot be read."""
    name = name.lower()
    compression = next((each for each in COMPRESSED if name.endswith(each)), "")
    kind = next((each for each in EXTENSIONS if name.removesuffix(compression).endswith(each)), None)
    return None if kind is None else (kind, compression)


def read_file(path: Path, source: str, first: int = 1) -> Iterator[Row | DataError]:
    """The rows of a file, in order; for a row that is wrong, the error about it instead.

    Args:
        path: The file.
        source: What the user calls it.
        first: Number of its first row.

    Raises:
        DataError: the file as a whole cannot be read, or not any further.
    """
    kind, compression = check_file(path, source)
    text = Text(source, first)
    with _told(path, compression, text), ExitStack() as stack:
        text.stream = _unpacked(path, compression, stack)
        if kind == ".parquet":
            yield from _read_parquet(text, packed=bool(compression))
            return
        head = text.stream.peek()
        _check_is_text(head, source)
        is_list = head.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n").startswith(b"[")
        if kind == ".csv":
            yield from read_csv(text)
        elif kind == ".json" and is_list:
            yield from JsonList(text).rows()
        else:
            yield from read_lines(text)


def check_file(path: Path, source: str) -> tuple[str, str]:
    """Extension and compression of a file that can be opened: opening a pipe would wait until somebody writes.

    Raises:
        DataError: it is none, is empty, or of an unknown kind.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"cannot be read: {reason(error)}", file=source) from error
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        names = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        raise DataError(f"is not a regular file but a {names.get(kind, 'device')}", file=source)
    extensions = kind_of(path.name)
    if extensions is None:
        raise DataError(f"unknown kind of file {path.suffix!r}", file=source, hint=ACCEPTED)
    if not found.st_size:
        raise DataError("is empty", file=source)
    return extensions


def _unpacked(path: Path, compression: str, stack: ExitStack) -> io.BufferedReader:
    file: io.BufferedReader = io.BufferedReader(stack.enter_context(path.open("rb", buffering=0)), CHUNK)
    if compression == ".gz":
        return io.BufferedReader(stack.enter_context(gzip.GzipFile(fileobj=file)), CHUNK)
    if compression == ".zst":
        import pyarrow  # comes with datasets

        return io.BufferedReader(stack.enter_context(pyarrow.CompressedInputStream(file, "zstd")), CHUNK)
    return file


@contextmanager
def _told(path: Path, compression: str, text: Text) -> Iterator[None]:
    """What the system or a decompressor raises, told by a DataError."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        source, line = text.source, text.line or None
        if not compression or getattr(error, "errno", None) is not None:
            raise DataError(f"cannot be read: {reason(error)}", file=source, line=line) from error
        with path.open("rb") as file:
            found = content(file.read(64))
        name = COMPRESSED[compression]
        if found not in (name, None):
            raise DataError(f"is named {compression}, but it is {found}", file=source) from error
        cut_off = isinstance(error, EOFError) or "Truncated" in str(error)
        problem = "end too early: the file is cut off" if cut_off else f"are damaged: {reason(error)}"
        place = ", somewhere after this line" if line else ""
        raise DataError(f"the {name} data {problem}{place}", file=source, line=line) from error


def content(head: bytes) -> str | None:
    """What a file is by its first bytes, if that can be told; ``text`` for UTF-8."""
    known = next((name for magic, name in _CONTENT.items() if head.startswith(magic)), None)
    if known is None and any(head[:4]) and b"\0\0" in (head[0:4:2], head[1:4:2]):
        return "UTF-16"  # without its mark
    if known is None:
        with suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
            return "text" if all(mark.isprintable() or mark.isspace() for mark in text) else None
    return known


def _check_is_text(head: bytes, source: str) -> None:
    found = content(head[:64])
    if not head:
        raise DataError("is empty", file=source)
    if found in ("UTF-16", "UTF-32"):
        raise DataError(f"is not UTF-8 but {found}", file=source, line=1, hint="Convert the file to UTF-8.")
    if found not in ("text", None):
        raise DataError(f"is not what its name says, but {found}", file=source, hint=ACCEPTED)


def _read_parquet(text: Text, *, packed: bool) -> Iterator[Row | DataError]:
    """Batch by batch. A parquet file is read from its end, so a packed one is unpacked into a temporary file."""
    import pyarrow.parquet  # comes with datasets

    with tempfile.TemporaryFile() if packed else nullcontext(text.stream) as file:
        if packed:
            shutil.copyfileobj(text.stream, file, CHUNK)
        try:
            options = {"pre_buffer": False, "buffer_size": CHUNK, "page_checksum_verification": True}
            with pyarrow.parquet.ParquetFile(file, **options) as parquet:
                names = parquet.schema_arrow.names
                if len(set(names)) < len(names):
                    raise DataError(f"two columns are named {cut(repeated(names))}", file=text.source)
                for batch in parquet.iter_batches(batch_size=_rows_at_once(parquet.metadata, file, text.source)):
                    for values in table_rows(batch):
                        text.number += 1
                        place = Place(text.source, text.number)
                        yield Row(values, place) if isinstance(values, dict) else place.error(values)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            file.seek(0)
            found = content(file.read(64))
            what = f"but {found}" if found not in ("parquet", None) else f"or it is damaged: {reason(error)}"
            raise DataError(f"is not a parquet file, {what}", file=text.source) from error


def _rows_at_once(metadata: Any, file: Any, source: str) -> int:
    """How many rows may be read together, so that their texts fit into memory.

    Raises:
        DataError: a row alone would not.
    """
    most = _PARQUET_BATCH
    for group in range(metadata.num_row_groups):
        for column in map(metadata.row_group(group).column, range(metadata.num_columns)):
            if column.physical_type != "BYTE_ARRAY" or not column.num_values:
                continue
            size = column.total_uncompressed_size
            kind, first = _first_page(file, column)
            if size > _LARGEST_TEXT * column.num_values or first > size + _LARGEST_TEXT:
                name = cut(column.path_in_schema)
                message = (
                    f"row group {group + 1}: a text of the column {name} unpacks to more than {_LARGEST_TEXT:,} bytes"
                )
                raise DataError(message, file=source)
            # one text of a dictionary may be that of all rows, and one that is told by what differs from the last
            shared = size if "DELTA_BYTE_ARRAY" in column.encodings else first if kind == _DICTIONARY_PAGE else 0
            most = min(most, _LARGEST_BATCH // max(shared, 1))
    return max(1, most)


def _first_page(file: Any, column: Any) -> tuple[int, int]:
    """Of which kind the first page of a column's chunk is, and how many bytes it unpacks to, as its header says."""
    starts = [column.data_page_offset, column.dictionary_page_offset if column.has_dictionary_page else None]
    file.seek(min(start for start in starts if start is not None))
    found, head = [], iter(file.read(32))
    for _ in range(2):  # Thrift's compact protocol: the next field, a 32-bit number in zigzag
        if next(head, None) != _NEXT_INT32:
            return 0, 0
        number = shift = 0
        for byte in head:
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        found.append(number >> 1 ^ -(number & 1))
    return found[0], found[1]


def table_rows(table: Any) -> list[dict[str, Any] | str]:
    """The rows of an Arrow table or batch; for one that cannot be read, what is wrong with it."""
    try:
        return table.to_pylist()
    except (ValueError, OverflowError) as error:
        if len(table) == 1:
            return [f"cannot be read: {reason(error)}"]
        return [row for at in range(len(table)) for row in table_rows(table.slice(at, 1))]
