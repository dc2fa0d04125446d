"""Read the rows of one file, also compressed: strict, and in bounded memory.

For a bad row the reader yields an error and continues with the next row. If it cannot know where the next row begins,
as after an unclosed quote in CSV or in a truncated stream, it raises the error.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

from peftcli.data.conll import read_conll
from peftcli.data.dialect import UTF8, Dialect, Recoded, find_delimiter, find_encoding
from peftcli.data.excel import read_excel
from peftcli.data.plain_text import HEAD, form_of, read_document, read_text
from peftcli.data.rows import Place, Row
from peftcli.data.squad import is_squad, read_squad
from peftcli.data.text_rows import (
    CHUNK,
    JsonStream,
    TextFile,
    first_duplicate,
    first_line,
    parse_json,
    quote,
    read_csv,
    read_lines,
)
from peftcli.errors import DataError
from peftcli.guard.arrow_sizes import unpacked_sizes
from peftcli.guard.files import irregular_kind

_TABLES = (".csv", ".tsv")
_TAGGED = (".conll", ".conllu", ".bio", ".iob")
EXTENSIONS = (
    *(".jsonl", ".ndjson", ".json", *_TABLES, ".txt", ".parquet", ".arrow", ".feather", ".xlsx"),
    *_TAGGED,
)
"""Extensions of the files that can be read."""
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
"""Extensions of compressed files, as in ``a.jsonl.gz``."""
ACCEPTED = f"Files that can be read: {', '.join(EXTENSIONS)}, each also as {' or '.join(COMPRESSED)}."
"""A hint."""

_PARQUET_BATCH = 64
"""Rows in memory at once. A row may be large."""
_MAX_BATCH = 256 << 20
"""Bytes of the texts of one column in a batch, and of all values of one row."""
_MAX_ARROW_BATCH = 1 << 30
"""Bytes that a compressed record batch may unpack to: all its rows are in memory at once."""
_NO_KEYS = {"struct", "list", "large_list", "fixed_size_list", "map"}
"""Types of a map's keys that no object has: such a map stays a list of pairs."""
_VALUE_BYTES = 25
"""Approximate bytes of a value in Python, without its text."""
_MAX_ITEMS = max(1 << 28, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 24)
"""Items of one list, as announced in the file: as many as fit into half of the memory, at 12 bytes each."""
_MAX_TEXT = 40_000_000
"""Bytes of one text of a table; far more than can be trained on."""
_DICTIONARY_PAGE, _NEXT_INT32 = 2, 0x15

_COCO = re.compile(rb'\{\s*"(?:info|licenses|images|annotations|categories)"\s*:')
_COCO_KEYS = (b'"bbox"', b'"supercategory"', b'"coco_url"', b'"file_name"')
_CONTENT = {
    b"PAR1\x15": "parquet",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "a .zip or .xlsx file",
    b"\xd0\xcf\x11\xe0": "an Excel file of the old format .xls",
    b"FEA1": "a Feather file of version 1",
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
"""First bytes of a file -> its kind, for messages about wrongly named files."""


def kind_of(name: str) -> tuple[str, str] | None:
    """Return extension and compression of a file name, such as ``(".jsonl", ".gz")``; None for other files."""
    name = name.lower()
    compression = next((each for each in COMPRESSED if name.endswith(each)), "")
    kind = next((each for each in EXTENSIONS if name.removesuffix(compression).endswith(each)), None)
    return None if kind is None else (kind, compression)


def find_dialect(
    path: Path, source: str, *, delimiter: str | None = None, encoding: str | None = None, is_document: bool = False
) -> Dialect:
    """Find how the text of a file is to be read, as far as it is not given.

    JSON is UTF-8, or UTF-16 with a byte order mark. What cannot be read now is an error when the rows are read.
    """
    kind, compression = check_file(path, source)
    if kind in _TABLES_OF:
        return Dialect()
    found = Dialect(encoding=encoding or UTF8)
    damaged = (OSError, EOFError, zlib.error)
    with suppress(*damaged), ExitStack() as stack:
        if encoding is None:
            stream = _open_uncompressed(path, compression, stack)
            found = replace(found, encoding=find_encoding(stream, whole=kind not in _JSON))
        if kind in _TABLES:
            stream = _recoded(_open_uncompressed(path, compression, stack), found.encoding)
            default = "\t" if kind == ".tsv" else ","
            found = replace(find_delimiter(stream, delimiter, default), encoding=found.encoding)
        if kind == ".txt" and not is_document:
            stream = _recoded(_open_uncompressed(path, compression, stack), found.encoding)
            found = replace(found, form=form_of(stream.read(HEAD)))
    return found


def read_file(
    path: Path, source: str, dialect: Dialect | None = None, *, is_document: bool = False
) -> Iterator[Row | DataError]:
    """Yield the rows of a file in order; for a bad row, the error about it.

    ``source`` names the file in messages. ``dialect``: how its text is read; None: found from its bytes.
    ``is_document``: it is a text file that is one row.

    Raises:
        DataError: the file, or the rest of it, cannot be read.
    """
    kind, compression = check_file(path, source)
    text, dialect = TextFile(source), dialect or find_dialect(path, source, is_document=is_document)
    with _translated_errors(path, compression, text), ExitStack() as stack:
        text.stream = _open_uncompressed(path, compression, stack)
        if kind in _TABLES_OF:
            yield from _TABLES_OF[kind](text, stack.enter_context(_seekable(text.stream, compression)))
            return
        _check_is_text(text.stream.peek(), source)
        if dialect.encoding != UTF8:
            text.stream, text.encoding = _recoded(text.stream, dialect.encoding), dialect.encoding
        head = text.stream.peek()
        start = head.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")
        if kind in _TABLES:
            yield from read_csv(text, dialect)
        elif kind in _TAGGED:
            yield from read_conll(text, universal=kind == ".conllu")
        elif kind == ".txt":
            yield from read_document(text) if is_document else read_text(text, dialect.form)
        elif kind == ".json" and start.startswith(b"["):
            yield from JsonStream(text).rows()
        elif kind == ".json" and is_squad(start):
            yield from read_squad(text)
        elif kind == ".json" and _COCO.match(start) and any(key in start for key in _COCO_KEYS):
            hint = "peftcli init makes rows of its boxes, or masks of its outlines."
            raise DataError("is COCO's JSON, which no task reads", file=source, hint=hint)
        elif kind == ".json" and re.match(rb"\{\s*?\n", start):
            line = head[: head.index(b"{")].count(b"\n") + 1
            hint = "Write the rows as a list of objects, [{...}, {...}], or one object per line."
            raise DataError("an object goes over several lines", file=source, line=line, hint=hint)
        else:
            yield from read_lines(text)


def read_stdin() -> Iterator[Row | DataError]:
    """Yield the rows of standard input, one JSON object per line; for a bad row, the error about it.

    Raises:
        DataError: there are no rows.
    """
    text = TextFile("standard input")
    text.stream = cast(io.BufferedReader, sys.stdin.buffer)
    yield from read_lines(text)
    if not text.number:
        raise DataError("contains no rows", file=text.source)


def check_file(path: Path, source: str) -> tuple[str, str]:
    """Return extension and compression of a file that can be opened.

    Raises:
        DataError: the file is not regular, is empty, or has an unknown extension.
    """
    size = check_regular(path, source)
    extensions = kind_of(path.name)
    if extensions is None:
        raise DataError(f"unknown file type {path.suffix!r}", file=source, hint=ACCEPTED)
    if not size:
        raise DataError("is empty", file=source)
    return extensions


def check_regular(path: Path, source: str) -> int:
    """Return the size of a regular file in bytes. Opening a pipe would wait until somebody writes.

    Raises:
        DataError: the file is not regular, or cannot be read.
    """
    if wrong := irregular_kind(path):
        raise DataError(wrong, file=source)
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot be read: {first_line(error)}", file=source) from error


def _recoded(stream: io.BufferedReader, encoding: str) -> io.BufferedReader:
    return stream if encoding == UTF8 else io.BufferedReader(Recoded(stream, encoding), CHUNK)


def _open_uncompressed(path: Path, compression: str, stack: ExitStack) -> io.BufferedReader:
    file: io.BufferedReader = stack.enter_context(io.BufferedReader(path.open("rb", buffering=0), CHUNK))
    if compression == ".gz":
        return io.BufferedReader(stack.enter_context(gzip.GzipFile(fileobj=file)), CHUNK)
    if compression == ".zst":
        import pyarrow  # comes with datasets

        return io.BufferedReader(stack.enter_context(pyarrow.CompressedInputStream(file, "zstd")), CHUNK)
    return file


@contextmanager
def _translated_errors(path: Path, compression: str, text: TextFile) -> Iterator[None]:
    """Translate the exceptions of the system and of decompressors into DataErrors."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        source, line = text.source, text.line or None
        if not compression or getattr(error, "errno", None) is not None:
            raise DataError(f"cannot be read: {first_line(error)}", file=source, line=line) from error
        with path.open("rb") as file:
            found = detect_kind(file.read(64))
        name = COMPRESSED[compression]
        if found not in (name, None):
            raise DataError(f"is named {compression}, but is {found}", file=source) from error
        cut_off = isinstance(error, EOFError) or "Truncated" in str(error)
        problem = "end too early: the file is truncated" if cut_off else f"are damaged: {first_line(error)}"
        place = ", somewhere after this line" if line else ""
        raise DataError(f"the {name} data {problem}{place}", file=source, line=line) from error


def detect_kind(head: bytes) -> str | None:
    """Return the kind of a file by its first bytes; ``text`` for UTF-8, None if unknown."""
    known = next((name for magic, name in _CONTENT.items() if head.startswith(magic)), None)
    if known is None and any(head[:4]) and b"\0\0" in (head[0:4:2], head[1:4:2]):
        return "UTF-16"  # without a byte order mark
    if known is None:
        with suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
            return "text" if all(mark.isprintable() or mark.isspace() for mark in text) else None
    return known


def _check_is_text(head: bytes, source: str) -> None:
    found = detect_kind(head[:64])
    if not head:
        raise DataError("is empty", file=source)
    if found not in ("text", "UTF-16", "UTF-32", None):
        raise DataError(f"does not match its extension: it is {found}", file=source, hint=ACCEPTED)


@contextmanager
def _seekable(stream: io.BufferedReader, compression: str) -> Iterator[IO[bytes]]:
    """The stream, or where it unpacks a file, a temporary file with its content: parquet needs random access."""
    with tempfile.TemporaryFile() if compression else nullcontext(stream) as file:
        if compression:
            shutil.copyfileobj(stream, file, CHUNK)
        yield file


def _read_parquet(text: TextFile, file: IO[bytes]) -> Iterator[Row | DataError]:
    """Read batch by batch."""
    import pyarrow.parquet  # comes with datasets

    try:
        metadata = pyarrow.parquet.read_metadata(file)
        rows, as_dictionary = _batch_size(metadata, file, text.source)
        options = {"pre_buffer": False, "buffer_size": CHUNK, "page_checksum_verification": True}
        with pyarrow.parquet.ParquetFile(file, metadata=metadata, read_dictionary=as_dictionary, **options) as parquet:
            names = parquet.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError(f"two columns are named {quote(first_duplicate(names))}", file=text.source)
            for batch in parquet.iter_batches(batch_size=rows):
                for values in table_rows(batch):
                    text.number += 1
                    place = Place(text.source, text.number)
                    yield Row(values, place) if isinstance(values, dict) else place.error(values)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:  # KeyError: a column has two names
        file.seek(0)
        found = detect_kind(file.read(64))
        what = f"but {found}" if found not in ("parquet", None) else f"or is damaged: {first_line(error)}"
        raise DataError(f"is not a parquet file, {what}", file=text.source) from error


def class_names_of(path: Path) -> dict[str, tuple[str, ...]]:
    """The names of classes that a table which datasets wrote declares, by column; other files declare none."""
    kind, compression = kind_of(path.name) or ("", "")
    if kind not in (".parquet", ".arrow", ".feather"):
        return {}
    import pyarrow.parquet  # comes with datasets

    damaged = (pyarrow.ArrowException, OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError)
    with suppress(*damaged), ExitStack() as stack:
        file = stack.enter_context(_seekable(_open_uncompressed(path, compression, stack), compression))
        schema = pyarrow.parquet.read_schema(file) if kind == ".parquet" else open_arrow(file)[0]
        described = schema.metadata or {}
        return class_names(json.loads(described[b"huggingface"])["info"]["features"])
    return {}


def class_names(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The names of classes among the features of a dataset, as JSON describes them: column -> names."""
    found = {}
    for column, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        if inner.get("_type") == "ClassLabel" and isinstance(inner.get("names"), list):
            found[column] = tuple(map(str, inner["names"]))
    return found


def _batch_size(metadata: Any, file: Any, source: str) -> tuple[int, list[str]]:
    """Return how many rows fit into memory together, and the columns to read as dictionaries, each text once."""
    most, as_dictionary = _PARQUET_BATCH, set[str]()
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group)
        for at in range(metadata.num_columns):
            column, items = rows.column(at), 1
            place = f"row group {group + 1}: {{}} of the column {quote(column.path_in_schema)}"
            if metadata.schema.column(at).max_repetition_level:
                items = column.num_values - rows.num_rows + 1  # in one row, if the others are empty
                if items > _MAX_ITEMS:
                    raise DataError(
                        f"{place.format('a row')} may contain {items:,} list items, more than {_MAX_ITEMS:,}",
                        file=source,
                        hint="Leave the column out, or write the file with smaller row groups.",
                    )
            if column.physical_type != "BYTE_ARRAY" or not column.num_values:
                continue
            size = column.total_uncompressed_size
            kind, first = _first_page(file, column)
            if size > _MAX_TEXT * column.num_values or first > size + _MAX_TEXT:
                message = f"{place.format('a text')} unpacks to more than {_MAX_TEXT:,} bytes"
                raise DataError(message, file=source)
            # all rows may share one text of a dictionary, or repeat it by its difference from the last
            shared = size if "DELTA_BYTE_ARRAY" in column.encodings else first if kind == _DICTIONARY_PAGE else 0
            if items > 1 and kind == _DICTIONARY_PAGE:  # or all items of a row may share it
                as_dictionary.add(column.path_in_schema)
            most = min(most, _MAX_BATCH // max(shared, 1))
    return max(1, most), sorted(as_dictionary)


def _first_page(file: Any, column: Any) -> tuple[int, int]:
    """Return type and uncompressed size of the first page of a column chunk, from the page's header."""
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


def _read_arrow(text: TextFile, file: IO[bytes]) -> Iterator[Row | DataError]:
    """Read the record batches of Arrow's format for files, or for streams, as datasets writes it."""
    import pyarrow

    try:
        for number, size in enumerate(unpacked_sizes(file), 1):
            if size > _MAX_ARROW_BATCH:
                message = f"record batch {number} unpacks to {size:,} bytes, more than {_MAX_ARROW_BATCH:,}"
                raise DataError(message, file=text.source, hint="Write the file with smaller batches.")
        file.seek(0)
        _, batches = open_arrow(file)
        for batch in batches:
            batch.validate(full=True)  # or places in the file could lead out of it
            for start in range(0, len(batch), _PARQUET_BATCH):
                for values in table_rows(batch.slice(start, _PARQUET_BATCH)):
                    text.number += 1
                    place = Place(text.source, text.number)
                    yield Row(values, place) if isinstance(values, dict) else place.error(values)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, struct.error) as error:
        file.seek(0)
        found = detect_kind(file.read(64))
        wrong = found if found != "an Arrow file" else None
        what = f"but {wrong}" if wrong else f"or is damaged: {first_line(error)}"
        raise DataError(f"is not an Arrow file, {what}", file=text.source) from error


def open_arrow(file: IO[bytes]) -> tuple[Any, Iterator[Any]]:
    """Return the schema and the record batches of an open Arrow file.

    Raises:
        pyarrow.ArrowException: it is not one.
    """
    import pyarrow.ipc

    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    if not is_file:
        stream = pyarrow.ipc.open_stream(file)
        return stream.schema, iter(stream)
    opened = pyarrow.ipc.open_file(file)
    return opened.schema, map(opened.get_batch, range(opened.num_record_batches))


_TABLES_OF = {".parquet": _read_parquet, ".arrow": _read_arrow, ".feather": _read_arrow, ".xlsx": read_excel}
"""Extension of a file that is not text -> its reader."""
_JSON = (".jsonl", ".ndjson", ".json")


def table_rows(table: Any) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of an Arrow table or batch; for a row that cannot be read, a message about it."""
    size = sum(_memory(part) for column in table.columns for part in getattr(column, "chunks", [column]))
    problem = f"unpacks to about {size:,} bytes, more than {_MAX_BATCH:,}" if size > _MAX_BATCH else None
    if problem is None:
        try:
            maps = set(re.findall(r"map<(\w+)", str(table.schema.types)))
            as_objects = bool(maps) and maps.isdisjoint(_NO_KEYS)
            rows = table.to_pylist(maps_as_pydicts="strict") if as_objects else table.to_pylist()
            for field in table.schema:
                if _is_nested(field.type):
                    for row in rows:
                        row[field.name] = _plain(row[field.name], field.type)
            yield from rows
            return
        except (ValueError, OverflowError, KeyError) as error:  # KeyError: a key is twice in a map
            problem = f"cannot be read: {first_line(error)}"
    if len(table) == 1:
        yield problem
        return
    for at in range(len(table)):
        yield from table_rows(table.slice(at, 1))


def _is_json(kind: Any) -> bool:
    return getattr(kind, "extension_name", None) == "arrow.json"


def _is_nested(kind: Any) -> bool:
    return bool(kind.num_fields) or _is_json(kind)


def _plain(value: Any, kind: Any) -> Any:
    """Return a value of an Arrow type as a JSON file would contain it.

    A table gives every object the keys of all, null where there was none: these nulls are left out. Texts of the type
    JSON, which datasets gives to columns of mixed kinds, are parsed.
    """
    from pyarrow import types

    if value is None:
        return None
    if _is_json(kind):
        parsed, fault = parse_json(value)
        if fault:
            raise ValueError(fault)
        return parsed
    if types.is_struct(kind):
        pairs = ((field.name, _plain(value[field.name], field.type)) for field in kind)
        return {key: item for key, item in pairs if item is not None}
    if types.is_map(kind):
        return {key: _plain(item, kind.item_type) for key, item in value.items()} if isinstance(value, dict) else value
    if isinstance(value, list) and hasattr(kind, "value_type") and _is_nested(kind.value_type):
        return [_plain(item, kind.value_type) for item in value]
    return value


def _memory(array: Any) -> int:
    """Estimate the bytes of the values of an Arrow array as Python objects."""
    from pyarrow import compute, types

    kind, own = array.type, _VALUE_BYTES * len(array)
    if hasattr(array, "storage"):
        return _memory(array.storage)
    if types.is_dictionary(kind):
        of = kind.value_type
        if not any((types.is_string(of), types.is_large_string(of), types.is_binary(of), types.is_large_binary(of))):
            return own
        return own + (compute.sum(compute.binary_length(array.dictionary).take(array.indices)).as_py() or 0)
    if types.is_struct(kind):
        return own + sum(map(_memory, array.flatten()))
    if types.is_map(kind):
        start, end = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return own + sum(_memory(part.slice(start, end - start)) for part in (array.keys, array.items))
    return own + (_memory(array.flatten()) if hasattr(array, "flatten") else array.nbytes)
