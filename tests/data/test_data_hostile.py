"""Bad files: each ends in one short error that names the file and, where there are lines, the line.

None crashes, hangs, takes memory without bound, or gives rows that the file does not hold.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from peftcli.data import text_rows
from peftcli.data.formats import Example, example_reader
from peftcli.data.rows import Row
from peftcli.data.sources import open_source
from peftcli.errors import DataError
from peftcli.schema import Source

pytestmark = pytest.mark.timeout(60)  # a file that hangs fails here


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zstd(data: bytes) -> bytes:
    import pyarrow

    packed: bytes = pyarrow.compress(data, codec="zstd", asbytes=True)
    return packed


def parquet(**columns: Any) -> bytes:
    import pyarrow.parquet

    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), data)
    return data.getvalue()


PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def read(path: Path) -> tuple[list[dict[str, Any]], list[DataError]]:
    """The rows of a file, and the errors about others or about the whole."""
    rows, errors = [], []
    try:
        for row in open_source(Source(train=str(path))).rows():
            if isinstance(row, Row):
                rows.append(row.values)
            else:
                errors.append(row)
    except DataError as error:
        errors.append(error)
    for error in errors:
        check(error, path)
    return rows, errors


def check(error: DataError, path: Path) -> None:
    """An error is short, names the file and holds nothing that a terminal would act on."""
    text = str(error)
    assert error.file == str(path)
    assert len(text.splitlines()) <= 6
    assert len(text) < 1000
    assert text.replace("\n", "").isprintable()


# --- one bad row: the error stands in its place, and the rows around it are read

NOT_JSON = "is not a JSON object: "
BAD_ROWS: dict[str, tuple[str | bytes, str]] = {
    "plain text": ("hello", NOT_JSON + "Expecting value at character 1"),
    "an object that is cut": ('{"a": ', NOT_JSON + "Expecting value at character 6"),
    "a string that is cut": ('{"a": "x', NOT_JSON + "Unterminated string"),
    "a Python dict": ("{'a': 1}", NOT_JSON + "Expecting property name"),
    "a key without quotes": ("{a: 1}", NOT_JSON + "Expecting property name"),
    "no colon": ('{"a" 1}', NOT_JSON + "Expecting ':' delimiter"),
    "no comma": ('{"a": 1 "b": 2}', NOT_JSON + "Expecting ',' delimiter"),
    "a comma too many": ('{"a": 1,}', NOT_JSON),
    "a comma behind it": ('{"a": 1},', NOT_JSON + "Text after the object at character 9"),
    "two objects": ('{"a": 1} {"b": 2}', NOT_JSON + "Text after the object"),
    "a comment": ('{"a": 1} // one', NOT_JSON + "Text after the object"),
    "a literal that is cut": ('{"a": tru}', NOT_JSON + "Expecting value"),
    "a capital literal": ('{"a": True}', NOT_JSON + "Expecting value"),
    "undefined": ('{"a": undefined}', NOT_JSON + "Expecting value"),
    "a plus sign": ('{"a": +1}', NOT_JSON + "Expecting value"),
    "a leading point": ('{"a": .5}', NOT_JSON + "Expecting value"),
    "a leading zero": ('{"a": 01}', NOT_JSON + "Expecting ',' delimiter"),
    "a hexadecimal number": ('{"a": 0x10}', NOT_JSON + "Expecting ',' delimiter"),
    "an unknown escape": ('{"a": "\\q"}', NOT_JSON + "Invalid \\escape at character 8"),
    "an escape that is cut": ('{"a": "\\u12"}', NOT_JSON + "Invalid"),
    "a bare tab in a string": ('{"a": "x\ty"}', NOT_JSON + "Invalid control character"),
    "a terminal's escape": ('\x1b[31m{"a": 1}', "'\\x1b[31m{"),
    "NaN": ('{"a": NaN}', "NaN is not JSON"),
    "Infinity": ('{"a": [Infinity]}', "Infinity is not JSON"),
    "-Infinity": ('{"a": {"b": -Infinity}}', "-Infinity is not JSON"),
    "1e999": ('{"a": 1e999}', "'1e999' is too large for a number"),
    "-1e999": ('{"a": [-1e999]}', "'-1e999' is too large for a number"),
    "a number of 5000 digits": ('{"a": ' + "9" * 5000 + "}", NOT_JSON + "Exceeds the limit"),
    "a key twice": ('{"a": 1, "b": 2, "a": 1}', "the key 'a' stands twice in one object"),
    "a key twice, deeper": ('{"a": [{"b": 1, "b": 2}]}', "the key 'b' stands twice in one object"),
    "a key twice, once escaped": ('{"a": 1, "\\u0061": 2}', "the key 'a' stands twice in one object"),
    "a long key twice": ('{"%s": 1, "%s": 2}' % (("k" * 9999,) * 2), "kkk...' stands twice in one object"),
    "a list": ("[1]", "expected a JSON object, found a list: '[1]'"),
    "a list of objects": ('[{"a": 1}]', "expected a JSON object, found a list"),
    "a string": ('"x"', "expected a JSON object, found a string"),
    "null": ("null", "expected a JSON object, found null"),
    "true": ("true", "expected a JSON object, found a truth value"),
    "a number": ("-1.5", "expected a JSON object, found a number"),
    "half a surrogate pair": ('{"a": "\\ud800"}', "half of a surrogate pair"),
    "the other half": ('{"a": "x\\uDFFFy"}', "half of a surrogate pair"),
    "the halves in turn": ('{"a": "\\ude00\\ud83d"}', "half of a surrogate pair"),
    "half a surrogate pair in a key": ('{"\\udabc": 1}', "half of a surrogate pair"),
    "101 levels": ('{"a": ' + "[" * 100 + "1" + "]" * 100 + "}", "nested too deeply: more than 100 levels"),
    "100,000 brackets": ("[" * 100_000, "nested too deeply"),
    "100,000 closed brackets": ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "100,000 objects": ('{"a":' * 100_000, "nested too deeply"),
    "a NUL byte": ('{"a": "\0"}', "holds a NUL byte"),
    "NUL bytes alone": ("\0" * 100, "holds a NUL byte"),
    "Latin-1": (b'{"a": "\xe9"}', "is not UTF-8: byte 0xe9 at byte 8 of the line"),
    "a byte that no UTF-8 holds": (b'{"a": "\xff"}', "is not UTF-8: byte 0xff at byte 8"),
    "a character that is cut": (b'{"a": "\xe2\x82"}', "is not UTF-8: byte 0xe2 at byte 8"),
    "a slash in two bytes": (b'{"a": "\xc0\xaf"}', "is not UTF-8: byte 0xc0 at byte 8"),
    "a surrogate as UTF-8": (b'{"a": "\xed\xa0\x80"}', "is not UTF-8: byte 0xed at byte 8"),
    "a character beyond Unicode": (b'{"a": "\xf4\x90\x80\x80"}', "is not UTF-8: byte 0xf4 at byte 8"),
    "a byte order mark in the middle": ('\ufeff{"a": 1}', "the line begins '\\ufeff{"),
    "a no-break space before": ('\xa0{"a": 1}', NOT_JSON + "Expecting value at character 1"),
    "a line separator between objects": ('{"a": 1}\u2028{"a": 2}', NOT_JSON + "Text after the object"),
    "a carriage return alone": ('{"a": 1}\r{"a": 2}', NOT_JSON + "Text after the object"),
    "a megabyte of something": ("x" * 1_000_000, NOT_JSON + "Expecting value at character 1"),
    "a megabyte of quotes": ('"' * 999_999, NOT_JSON),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row(tmp_path: Path, case: str) -> None:
    bad, message = BAD_ROWS[case]
    raw = bad if isinstance(bad, bytes) else bad.encode()
    path = write(tmp_path, "a.jsonl", b'{"a": "before"}\n' + raw + b'\n{"a": "after"}\n')
    rows, [error] = read(path)
    assert rows == [{"a": "before"}, {"a": "after"}]
    assert error.line == 2
    assert message in error.message


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("case", ["Latin-1", "a NUL byte", "a key twice", "an object that is cut"])
def test_a_bad_row_in_a_packed_file(tmp_path: Path, case: str, packed: str) -> None:
    bad, message = BAD_ROWS[case]
    raw = bad if isinstance(bad, bytes) else bad.encode()
    rows, [error] = read(write(tmp_path, f"a.jsonl{packed}", PACKERS[packed](raw + b'\n{"a": 1}')))
    assert rows == [{"a": 1}]
    assert error.line == 1
    assert message in error.message


def test_a_carriage_return_alone_is_explained(tmp_path: Path) -> None:
    _, [error] = read(write(tmp_path, "a.jsonl", '{"a": 1}\r{"a": 2}\r{"a": 3}'))
    assert "carriage return" in (error.hint or "")


@pytest.mark.parametrize("first", ["[", "{", '[{"a": 1}, {"a": 2}]', '[{"a": 1},'])
def test_a_list_named_jsonl_is_explained(tmp_path: Path, first: str) -> None:
    _, errors = read(write(tmp_path, "a.jsonl", first + "\n"))
    assert "a .json file holds that, or one list of objects" in (errors[0].hint or "")


IN_LISTS = ["NaN", "1e999", "a key twice, deeper", "a list", "a string", "null", "a number", "half a surrogate pair",
            "101 levels"]  # fmt: skip


@pytest.mark.parametrize("case", IN_LISTS)
def test_a_bad_row_in_a_list(tmp_path: Path, case: str) -> None:
    bad, message = BAD_ROWS[case]
    rows, [error] = read(write(tmp_path, "a.json", f'[{{"a": "before"}},\n{bad}\n,\n{{"a": "after"}}]'))
    assert rows == [{"a": "before"}, {"a": "after"}]
    assert error.line == 2
    assert message in error.message


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_numbers_in_a_list_that_is_read_in_stretches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(text_rows, "CHUNK", chunk)
    rows, errors = read(write(tmp_path, "a.json", '[12345, {"a": 1}, 1.5e+10]'))
    assert rows == [{"a": 1}]
    assert [error.message for error in errors] == [
        f"expected a JSON object, found a number: '{number}'" for number in ("12345", "1.5e+10")
    ]


def test_bytes_that_are_no_text_in_a_list(tmp_path: Path) -> None:
    rows, [error] = read(write(tmp_path, "a.json", b'[{"a": 1},\n{"a": "caf\xe9"},\n{"a": 2}]'))
    assert rows == [{"a": 1}, {"a": 2}]
    assert (error.line, error.message) == (2, 'is not UTF-8: byte 0xe9 in \'{"a": "caf\\udce9"}\'')


BAD_RECORDS: dict[str, tuple[str | bytes, str]] = {
    "a field too few": ("1", "1 fields, but the header has 2: '1'"),
    "a field too many": ("1,2,3", "3 fields, but the header has 2"),
    "semicolons": ("1;2", "1 fields, but the header has 2"),
    "many fields": ("," * 100_000, "100001 fields, but the header has 2"),
    "a NUL byte": ("1,\0", "holds a NUL byte"),
    "a NUL byte alone": ("\0", "holds a NUL byte"),
    "Latin-1": (b"1,\xe9", "is not UTF-8: byte 0xe9 at byte 3 of the line"),
    "Latin-1 in quotes": (b'1,"\xe9\n\xe8"', "is not UTF-8: byte 0xe9 at byte 4 of the line"),
    "a character that is cut": (b'"\xe2\x82",1', "is not UTF-8: byte 0xe2"),
    "a quote that begins too late": ('x"y,z,1', "3 fields, but the header has 2"),
    "a terminal's escape": ("\x1b[31m", "'\\x1b[31m'"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_of_csv(tmp_path: Path, case: str) -> None:
    bad, message = BAD_RECORDS[case]
    raw = bad if isinstance(bad, bytes) else bad.encode()
    rows, [error] = read(write(tmp_path, "a.csv", b'a,b\n"before\n",1\n' + raw + b"\nafter,2\n"))
    assert rows == [{"a": "before\n", "b": "1"}, {"a": "after", "b": "2"}]
    assert error.line == 4
    assert message in error.message


def test_a_row_of_parquet_that_is_no_text(tmp_path: Path) -> None:
    import pyarrow

    column = pyarrow.array([b"x", b"\xff", b"y"]).cast(pyarrow.string(), safe=False)
    rows, [error] = read(write(tmp_path, "a.parquet", parquet(a=column)))
    assert rows == [{"a": "x"}, {"a": "y"}]
    assert error.message.startswith("row 2: cannot be read: ")


# --- the file as a whole

BAD_FILES: dict[str, tuple[str, str | bytes, int | None, str]] = {
    "an empty file": ("a.jsonl", "", None, "is empty"),
    "an empty packed file": ("a.jsonl.gz", gzip.compress(b""), None, "is empty"),
    "blank lines": ("a.jsonl", "\n \r\n\t\n", None, "holds no rows"),
    "a byte order mark alone": ("a.jsonl", "\ufeff", None, "holds no rows"),
    "an empty list": ("a.json", "[]", None, "holds no rows"),
    "an empty CSV": ("a.csv", "\n\n", None, "holds no rows"),
    "a header alone": ("a.csv", "a,b\n", None, "holds no rows"),
    "UTF-16": ("a.jsonl", '{"a": 1}'.encode("utf-16"), 1, "is not UTF-8 but UTF-16"),
    "UTF-16, big end first": ("a.csv", "\ufeffa,b\n".encode("utf-16-be"), 1, "is not UTF-8 but UTF-16"),
    "UTF-16 without its mark": ("a.jsonl", '{"a": 1}'.encode("utf-16-le"), 1, "is not UTF-8 but UTF-16"),
    "UTF-16, packed": ("a.json.gz", gzip.compress("[]".encode("utf-16")), 1, "is not UTF-8 but UTF-16"),
    "UTF-32": ("a.jsonl", '{"a": 1}'.encode("utf-32"), 1, "is not UTF-8 but UTF-32"),
    "gzip named .jsonl": ("a.jsonl", gzip.compress(b"{}"), None, "is not what its name says, but gzip"),
    "gzip named .csv": ("a.csv", gzip.compress(b"a"), None, "but gzip"),
    "zstd named .json": ("a.json", zstd(b"[]"), None, "but zstd"),
    "packed twice": ("a.jsonl.gz", gzip.compress(gzip.compress(b"{}")), None, "but gzip"),
    "parquet named .jsonl": ("a.jsonl", parquet(a=[1]), None, "but parquet"),
    "parquet named .csv": ("a.csv", parquet(a=[1]), None, "but parquet"),
    "bzip2 named .jsonl": ("a.jsonl", bz2.compress(b"{}"), None, "but bzip2"),
    "xz named .jsonl": ("a.jsonl", lzma.compress(b"{}"), None, "but xz"),
    "a spreadsheet": ("a.csv", b"PK\x03\x04\x14\0\x06\0", None, "but a .zip or .xlsx file"),
    "a database": ("a.json", b"SQLite format 3\0\x10\0", None, "but an SQLite database"),
    "a PDF": ("a.jsonl", "%PDF-1.7\n", None, "but a PDF"),
    "an Arrow file": ("a.jsonl", b"ARROW1\0\0\xff\xff\xff\xff", None, "but an Arrow file"),
    "a web page": ("a.jsonl", "<!DOCTYPE html>\n<html>", None, "but a web page"),
    "a pointer to the data": ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid x\n", None, "git lfs pull"),
    "text named .parquet": ("a.parquet", '{"a": 1}\n', None, "is not a parquet file, but text"),
    "gzip named .parquet": ("a.parquet", gzip.compress(parquet(a=[1])), None, "is not a parquet file, but gzip"),
    "noise named .parquet": ("a.parquet", b"\x01\x02\xff" * 50, None, "is not a parquet file"),
    "text named .gz": ("a.jsonl.gz", '{"a": 1}\n', None, "is named .gz, but it is text"),
    "text named .zst": ("a.jsonl.zst", '{"a": 1}\n', None, "is named .zst, but it is text"),
    "zstd named .gz": ("a.csv.gz", zstd(b"a\nb\n"), None, "is named .gz, but it is zstd"),
    "gzip named .zst": ("a.csv.zst", gzip.compress(b"a\nb\n"), None, "is named .zst, but it is gzip"),
    "noise named .gz": ("a.jsonl.gz", b"\x01\x02\xff" * 50, None, "the gzip data are damaged"),
    "noise named .zst": ("a.jsonl.zst", b"\x01\x02\xff" * 50, None, "the zstd data are damaged"),
    "text in packed parquet": ("a.parquet.gz", gzip.compress(b"a,b\n"), None, "is not a parquet file, but text"),
    "parquet of two columns with one name": ("a.parquet", b"", None, "two columns are named 'a'"),
    "an object over many lines": ("a.json", '{"data":\n [{"a": 1}]}', 1, NOT_JSON),
    "a list that is not closed": ("a.json", '[{"a": 1}\n', 2, "expected ',' or ']', found ''"),
    "a list that ends in a comma": ("a.json", '[{"a": 1},\n', 2, "is not JSON: Expecting value"),
    "a bracket alone": ("a.json", "[", 1, "is not JSON: Expecting value"),
    "a list without a comma": ("a.json", '[{"a": 1}\n {"a": 2}]', 2, "expected ',' or ']', found '{\"a\": 2}]'"),
    "a list with two commas": ("a.json", '[{"a": 1},\n,{"a": 2}]', 2, "is not JSON: Expecting value"),
    "a comma before the end": ("a.json", '[{"a": 1},\n]', 2, "a comma before the closing ']'"),
    "text behind the list": ("a.json", '[{"a": 1}]\nmore', 2, "text after the end of the list: 'more'"),
    "a character that is cut behind the list": ("a.json", b"[]\n\xe2\x82", 2, "text after the end of the list"),
    "two lists": ("a.json", "[]\n[]", 2, "text after the end of the list: '[]'"),
    "an object that is cut": ("a.json", '[{"a": 1},\n{"a": }]', 2, "is not JSON: Expecting value; near '}]'"),
    "a Python dict in a list": ("a.json", "[{'a': 1}]", 1, "is not JSON: Expecting property name"),
    "a newline in a string": ("a.json", '[\n{"a": "x\ny"}]', 2, "Invalid control character"),
    "a NUL byte in a list": ("a.json", '[\n{"a": "\0"}]', 2, "Invalid control character; near '\\x00"),
    "a string without an end": ("a.json", '[{"a": 1},\n{"a": "x}]', 2, "Unterminated string"),
    "a huge number in a list": ("a.json", "[\n" + "9" * 5000 + "]", 2, "Exceeds the limit"),
    "brackets in a list": ("a.json", "[\n" + "[" * 100_000, 2, "nested too deeply"),
    "no text in a list": ("a.json", b'[{"a": 1},\n\xff]', 2, "is not UTF-8: byte 0xff"),
    "a quote without an end": ("a.csv", 'a,b\n1,2\n"3,4\n5,6\n', 3, "is not CSV: unexpected end of data"),
    "text behind a quote": ("a.csv", 'a,b\n"1"x,2\n', 2, "is not CSV: ',' expected after '\"'"),
    "a column name twice": ("a.csv", "a,b, a\n1,2,3\n", 1, "the header names 'a' twice"),
    "a column without a name": ("a.csv", "\na,\n1,2\n", 2, "column 2 of the header has no name"),
    "semicolons": ("a.csv", "a;b\n1;2\n", 1, "one column, 'a;b': fields are separated by commas, not by ';'"),
    "tabs": ("a.csv", "a\tb\n1\t2\n", 1, "not by '\\t'"),
    "a header that is no text": ("a.csv", b"a,\xe9\n1,2\n", 1, "is not UTF-8"),
    "a NUL byte in the header": ("a.csv", "a,\0\n1,2\n", 1, "holds a NUL byte"),
    "an unknown kind": ("a.txt", "x", None, "unknown kind of file '.txt'"),
    "no kind": ("a", "x", None, "unknown kind of file ''"),
    "a kind that is not unpacked": ("a.jsonl.bz2", bz2.compress(b"{}"), None, "unknown kind of file '.bz2'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file(tmp_path: Path, case: str) -> None:
    name, content, line, message = BAD_FILES[case]
    if "two columns" in case:
        import pyarrow.parquet

        table = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        write(tmp_path, name, content)
    rows, errors = read(tmp_path / name)
    error = errors[0]
    assert error.line == line
    assert message in error.message
    assert len(rows) <= 1
    assert rows in ([], [{"a": 1}], [{"a": "1", "b": "2"}])  # what stands before the fault


def test_there_are_enough_cases() -> None:
    assert len(BAD_ROWS) + len(IN_LISTS) + len(BAD_RECORDS) + len(BAD_FILES) > 120


# --- files that end early, or go on

LINES = b"".join(
    json.dumps({"n": n, "text": random.Random(n).randbytes(20).hex()}).encode() + b"\n" for n in range(200)
)
ROWS = [json.loads(line) for line in LINES.splitlines()]


@pytest.mark.parametrize("cut", [0.002, 0.01, 0.1, 0.5, 0.9, 0.99, -9, -8, -5, -4, -1])
@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_packed_file_that_is_cut_off(tmp_path: Path, packed: str, cut: float) -> None:
    whole = PACKERS[packed](LINES)
    rows, [error] = read(
        write(tmp_path, f"a.jsonl{packed}", whole[: cut if cut < 0 else max(5, int(len(whole) * cut))])
    )
    assert rows == ROWS[: len(rows)]
    assert "end too early: the file is cut off" in error.message
    assert error.line == (len(rows) or None)


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("garbage", [b"x", b"garbage", b"\xff" * 1000, b'{"n": 1}\n'])
def test_a_packed_file_with_something_behind_it(tmp_path: Path, packed: str, garbage: bytes) -> None:
    rows, [error] = read(write(tmp_path, f"a.jsonl{packed}", PACKERS[packed](LINES) + garbage))
    assert rows == ROWS[: len(rows)]
    name = {".gz": "gzip", ".zst": "zstd"}[packed]
    assert f"the {name} data " in error.message


def test_a_packed_file_whose_checksum_is_wrong(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(LINES))
    packed[-8] ^= 1
    _, [error] = read(write(tmp_path, "a.jsonl.gz", bytes(packed)))
    assert "the gzip data are damaged: CRC check failed" in error.message


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("cut", [4, 5, 12, 0.25, 0.5, 0.75, -100, -9, -8, -5, -4, -1])
def test_a_parquet_file_that_is_cut_off(tmp_path: Path, packed: str, cut: float) -> None:
    whole = parquet(n=[row["n"] for row in ROWS], text=[row["text"] for row in ROWS])
    part = whole[: int(len(whole) * cut) if isinstance(cut, float) else cut]
    rows, [error] = read(write(tmp_path, f"a.parquet{packed}", PACKERS[packed](part)))
    assert rows == []
    assert "is not a parquet file" in error.message


def test_a_parquet_file_with_checksums_that_was_changed(tmp_path: Path) -> None:
    import pyarrow.parquet

    path, table = tmp_path / "a.parquet", pyarrow.table({"a": ["the answer is yes"]})
    pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    assert read(path) == ([{"a": "the answer is yes"}], [])
    value = b"\x11\0\0\0the answer"  # with its length; without it stands in the statistics
    assert path.read_bytes().count(value) == 1
    path.write_bytes(path.read_bytes().replace(value, value.replace(b"the", b"THE")))
    rows, [error] = read(path)
    assert rows == []
    assert "CRC" in error.message


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_text_file_that_is_cut_off(tmp_path: Path, kind: str) -> None:
    texts = {
        ".jsonl": LINES,
        ".json": json.dumps(ROWS, indent=1).encode(),
        ".csv": b"n,text\n" + b"".join(f'{row["n"]},"{row["text"]}"\n'.encode() for row in ROWS),
    }
    rows, [error] = read(write(tmp_path, f"a{kind}", texts[kind][: len(texts[kind]) // 2 + 3]))
    assert 90 < len(rows) < 110
    assert error.line is not None


def test_a_bomb_of_zeros_is_one_line_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "LONGEST_ROW", 1 << 20)
    data = b'{"a": 1}\n' + b"\0" * (20 << 20) + b'\n{"a": 2}\n'
    for name, packed in (("a.jsonl.gz", gzip.compress(data, 1)), ("a.jsonl.zst", zstd(data))):
        rows, [error] = read(write(tmp_path, name, packed))
        assert rows == [{"a": 1}, {"a": 2}]
        assert (error.line, error.message) == (2, "a row of more than 64 MiB")


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.csv", 'a,b\n1,2\n"' + "3,4\n" * 5000, 3),
        ("a.csv", "a,b\n1,2\n" + "x" * 20_000, 3),
        ("a.json", '[{"a": 1},\n{"a": "' + "x" * 20_000 + '"}]', 2),
        ("a.json", '[{"a": 1},\n{"a": "' + "x" * 20_000, 2),
    ],
)
def test_a_row_without_an_end_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, line: int
) -> None:
    monkeypatch.setattr(text_rows, "LONGEST_ROW", 10_000)
    monkeypatch.setattr(text_rows, "CHUNK", 1000)
    rows, [error] = read(write(tmp_path, name, text))
    assert len(rows) == 1
    assert error.line == line
    assert "a row of more than 64 MiB" in error.message


# --- what is no file


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(path.parent)  # the name of a socket must be short
        made.bind(path.name)


SPECIAL: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a pipe": (os.mkfifo, "is not a regular file but a pipe"),
    "a socket": (make_socket, "is not a regular file but a socket"),
    "a link to a device without end": (lambda path: path.symlink_to("/dev/zero"), "but a device"),
    "a link to the terminal": (lambda path: path.symlink_to("/dev/tty"), "but a device"),
    "a link to nowhere": (lambda path: path.symlink_to(path.parent / "gone"), "cannot be read: No such file"),
    "a link to itself": (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
    "a file of the kernel": (lambda path: path.symlink_to("/proc/self/mem"), "is empty"),
    "a folder": (lambda path: path.mkdir(), "a folder without a file that can be read"),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_what_is_no_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = SPECIAL[case]
    make(path := tmp_path / "a.jsonl")
    _, [error] = read(path)
    assert message in error.message
    if "folder" not in case:  # nor where it stands among others
        with pytest.raises(DataError) as caught:
            open_source(Source(train=str(tmp_path)))
        assert message in caught.value.message


def test_a_pipe_that_takes_the_place_of_a_file_is_not_opened(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n')
    opened = open_source(Source(train=str(path)))
    path.unlink()
    os.mkfifo(path)
    for step in (opened.fingerprint, lambda: list(opened.rows())):
        with pytest.raises(DataError, match="is not a regular file but a pipe"):
            step()


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder of a user who is not root, and for the length of the test this process is that user's."""
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name), os.geteuid()
        if user == 0:  # root reads everything
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        yield folder
        os.seteuid(user)


def test_files_that_may_not_be_read(as_nobody: Path) -> None:
    path = write(as_nobody, "a.jsonl", "{}")
    path.chmod(0)
    _, [error] = read(path)
    assert "Permission denied" in error.message
    (as_nobody / "inner").mkdir(0)
    with pytest.raises(DataError, match="Permission denied"):
        open_source(Source(train=str(as_nobody)))


def test_the_system_fails_while_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n' * 10)

    def fails(self: text_rows.Text) -> Any:
        self.line = 3
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(text_rows.Text, "lines", fails)
    _, [error] = read(path)
    assert (error.line, error.message) == (3, "cannot be read: Input/output error")


# --- content: each of these is a file in order, and nothing that could be trained on


def first_example(path: Path) -> Example:
    source = Source(train=str(path))
    row = next(open_source(source).rows())
    if isinstance(row, DataError):
        raise row
    return example_reader(tuple(row.values), source, str(path))(row)


def turns(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
BAD_CONTENT: dict[str, dict[str, Any]] = {
    "null text": {"text": None},
    "a number for text": {"text": 5},
    "a list for text": {"text": ["x"]},
    "an object for text": {"text": {"x": "y"}},
    "empty text": {"text": " \n\t"},
    "a truth value for text": {"text": False},
    "null completion": {"prompt": "q", "completion": None},
    "null prompt": {"prompt": None, "completion": "a"},
    "empty completion": {"prompt": "q", "completion": ""},
    "a number for a completion": {"prompt": "q", "completion": 1.5},
    "turns as a prompt": {"prompt": [USER], "completion": [ANSWER]},
    "null messages": {"messages": None},
    "text for messages": {"messages": json.dumps([USER, ANSWER])},
    "an object for messages": {"messages": {"0": USER}},
    "no messages": turns(),
    "messages in messages": turns([USER, ANSWER]),
    "text for a message": turns("q", "a"),
    "null for a message": turns(USER, None),
    "no role": turns({"content": "q"}, ANSWER),
    "null role": turns({"role": None, "content": "q"}, ANSWER),
    "an unknown role": turns({"role": "robot", "content": "q"}, ANSWER),
    "a role with a capital": turns({"role": "User", "content": "q"}, ANSWER),
    "null content": turns({"role": "user", "content": None}, ANSWER),
    "null answer": turns(USER, {"role": "assistant", "content": None}),
    "no answer": turns(USER, {"role": "assistant"}),
    "a number for an answer": turns(USER, {"role": "assistant", "content": 7}),
    "an empty answer": turns(USER, {"role": "assistant", "content": "  "}),
    "parts for content": turns({"role": "user", "content": [{"type": "image"}]}, ANSWER),
    "no assistant": turns(USER),
    "a number for train": turns(USER, {**ANSWER, "train": 1}),
    "tools that are no JSON": {**turns(USER, ANSWER), "tools": "{"},
    "tools that are deep": {**turns(USER, ANSWER), "tools": "[" * 100_000},
    "tool calls that are none": turns(USER, {"role": "assistant", "tool_calls": [1]}),
    "null output": {"instruction": "q", "output": None},
    "a number for an instruction": {"instruction": 1, "output": "a"},
    "sharegpt without values": {"conversations": [{"from": "human"}, {"from": "gpt"}]},
    "sharegpt of an unknown kind": {"conversations": [{"from": "alien", "value": "q"}]},
    "no columns": {},
    "other columns": {"foo": "q", "bar": "a"},
    "two formats": {"text": "x", "prompt": "q", "completion": "a"},
    "columns with long names": {"x" * 100_000: 1, "y" * 100_000: 2},
    "10,000 columns": {f"column {n}": "x" for n in range(10_000)},
    "columns that move the cursor": {"\x1b[2J": "q", "a\nb": "x"},
}


@pytest.mark.parametrize("case", BAD_CONTENT)
def test_content_that_is_no_example(tmp_path: Path, case: str) -> None:
    path = write(tmp_path, "a.jsonl", "\n" + json.dumps(BAD_CONTENT[case]))
    with pytest.raises(DataError) as caught:
        first_example(path)
    check(caught.value, path)
    assert caught.value.line == 2 or caught.value.key == "dataset.format"


@pytest.mark.parametrize("case", ["null completion", "null answer", "null output", "null text", "no messages"])
def test_content_of_parquet_that_is_no_example(tmp_path: Path, case: str) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([BAD_CONTENT[case]]), path := tmp_path / "a.parquet")
    with pytest.raises(DataError) as caught:
        first_example(path)
    check(caught.value, path)
    assert caught.value.message.startswith("row 1: ")


# --- mutations of good files


def good_files() -> dict[str, bytes]:
    rows = [
        {"prompt": f"q {n} é😀", "completion": 'x,"\n' * (n % 5), "m": [{"role": "user", "content": "hi"}]}
        for n in range(20)
    ]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["a", "b"], *([row["prompt"], row["completion"]] for row in rows)])
    return {
        ".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(),
        ".json": json.dumps(rows, indent=1).encode(),
        ".csv": text.getvalue().encode(),
        ".parquet": parquet(a=[row["prompt"] for row in rows], m=[row["m"] for row in rows]),
    }


PIECES = [b'"', b"\n", b"\r", b",", b"\0", b"[", b"{", b"}", b"\\", b"\xff", b"\xef\xbb\xbf", b"\\ud800", b"\x7f" * 4]


def mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif kind == 1:
            changed[at:at] = rng.randbytes(rng.choice([1, 4]))
        elif kind == 2:
            del changed[at : at + rng.choice([1, 8, 100])]
        elif kind == 3:
            changed[at:at] = rng.choice(PIECES)
        else:
            del changed[max(1, at) :]
    return bytes(changed)


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_mutated_files_give_rows_or_errors(tmp_path: Path, kind: str, packed: str) -> None:
    good, rng = good_files()[kind], random.Random(f"{kind}{packed}")
    for number in range(60):
        data = mutated(PACKERS[packed](good), rng) if number % 2 else PACKERS[packed](mutated(good, rng))
        rows, errors = read(write(tmp_path, f"a{kind}{packed}", data))
        assert rows or errors
        for row in rows:
            assert isinstance(row, dict)
            json.dumps(row, ensure_ascii=False).encode()
