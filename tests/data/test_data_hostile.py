"""Bad files: each ends in one short error that names the file and, where there are lines, the line.

None crashes, hangs, takes memory without bound, or gives rows that the file does not hold.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile_data import (
    BAD_CONTENT,
    BAD_FILES,
    BAD_RECORDS,
    BAD_ROWS,
    IN_LISTS,
    PACKERS,
    SPECIAL,
    good_files,
    mutated,
    parquet,
    write,
    zstd,
)

from peftcli.data import readers, text_rows
from peftcli.data.rows import Row, Table
from peftcli.data.sources import open_source
from peftcli.errors import DataError
from peftcli.schema import Source
from peftcli.tasks.text.formats import ParsedRow, example_reader


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

LINES_AROUND = (b'{"a": "before"}\n', b'\n{"a": "after"}\n')
FORMS: dict[str, tuple[dict[str, Any], bytes, bytes]] = {
    "a.jsonl": (BAD_ROWS, *LINES_AROUND),
    "a.jsonl.gz": ({name: BAD_ROWS[name] for name in ("Latin-1", "an object that is cut")}, *LINES_AROUND),
    "a.jsonl.zst": ({name: BAD_ROWS[name] for name in ("a NUL byte", "a key twice")}, *LINES_AROUND),
    "a.json": ({name: BAD_ROWS[name] for name in IN_LISTS}, b'[{"a": "before"},\n', b'\n,\n{"a": "after"}]'),
    "a.csv": (BAD_RECORDS, 'a,b\n"be\nfore",é\n'.encode(), b"\nafter,2\n"),
}
"""File -> its bad rows, and what stands before and behind each."""


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, (cases, *_) in FORMS.items() for case in cases])
def test_a_bad_row(tmp_path: Path, name: str, case: str) -> None:
    cases, before, behind = FORMS[name]
    bad, message = cases[case]
    content = before + (bad if isinstance(bad, bytes) else bad.encode()) + behind
    rows, [error] = read(write(tmp_path, name, PACKERS.get(Path(name).suffix, bytes)(content)))
    assert [row["a"].replace("\n", "") for row in rows] == ["before", "after"]
    assert error.line == (4 if name == "a.csv" else 2)
    assert message in error.message


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        ("a.jsonl", '{"a": 1}\r{"a": 2}\r{"a": 3}', "carriage return"),
        ("a.jsonl", "[\n", "a .json file contains that, or one list of objects"),
        ("a.jsonl", '[{"a": 1}, {"a": 2}]\n', "a .json file contains that, or one list of objects"),
        ("a.json", '{\n  "a": 1\n}\n', "an object goes over several lines"),
        ("a.jsonl", '\ufeff{"a": 1}\n\ufeff{"a": 2}\n{"a": 3}\n', "byte order mark"),
    ],
)
def test_a_common_mistake_is_explained(tmp_path: Path, name: str, text: str, hint: str) -> None:
    _, errors = read(write(tmp_path, name, text))
    assert hint in str(errors[0])


@pytest.mark.grid
@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_numbers_in_a_list_that_is_read_in_stretches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(text_rows, "CHUNK", chunk)
    rows, errors = read(write(tmp_path, "a.json", '[12345, {"a": 1}, 1.5e+10]'))
    assert rows == [{"a": 1}]
    assert [error.message for error in errors] == [
        f"{row}expected a JSON object, found a number: '{number}'"
        for row, number in (("", "12345"), ("row 3: ", "1.5e+10"))
    ]


def test_bytes_that_are_no_text_in_a_list(tmp_path: Path) -> None:
    rows, [error] = read(write(tmp_path, "a.json", b'[{"a": 1},\n{"a": "caf\xe9"},\n{"a": 2}]'))
    assert rows == [{"a": 1}, {"a": 2}]
    assert (error.line, error.message) == (2, 'is not UTF-8: byte 0xe9 in \'{"a": "caf\\udce9"}\'')


def columns_with_a_bad_value() -> dict[str, Any]:
    import pyarrow

    pairs = pyarrow.map_(pyarrow.string(), pyarrow.int64())
    return {
        "UTF": pyarrow.array([b"x", b"\xff", b"y"]).cast(pyarrow.string(), safe=False),
        "Expecting": pyarrow.array(['"x"', "{", '"y"'], pyarrow.json_()),
        "NaN": pyarrow.array(['"x"', '{"a": NaN}', '"y"'], pyarrow.json_()),
        "duplicate key": pyarrow.array([[("k", 1)], [("k", 1), ("k", 2)], [("k", 2)]], pairs),
    }


@pytest.mark.parametrize("problem", ["UTF", "Expecting", "NaN", "duplicate key"])
def test_a_row_of_a_table_that_cannot_be_read(tmp_path: Path, problem: str) -> None:
    column = columns_with_a_bad_value()[problem]
    rows, [error] = read(write(tmp_path, "a.parquet", parquet(a=column)))
    assert rows == ([{"a": {"k": 1}}, {"a": {"k": 2}}] if problem == "duplicate key" else [{"a": "x"}, {"a": "y"}])
    assert error.message.startswith("row 2: cannot be read: ")
    assert problem.lower() in error.message.lower()


def test_a_map_whose_keys_are_objects_stays_a_list_of_pairs(tmp_path: Path) -> None:
    import pyarrow

    kind = pyarrow.map_(pyarrow.struct([("a", pyarrow.int64())]), pyarrow.int64())
    maps = pyarrow.array([[({"a": 1}, 2)]], kind)
    rows, errors = read(write(tmp_path, "a.parquet", parquet(a=maps)))
    assert not errors
    assert rows == [{"a": [({"a": 1}, 2)]}]


# --- the file as a whole


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file(tmp_path: Path, case: str) -> None:
    name, content, line, message = BAD_FILES[case]
    write(tmp_path, name, content)
    rows, errors = read(tmp_path / name)
    error = errors[0]
    assert error.line == line
    assert message in error.message
    assert len(rows) <= 1
    assert rows in ([], [{"a": 1}], [{"a": "1", "b": "2"}])  # what stands before the fault


# --- files that end early, or go on

LINES = b"".join(
    json.dumps({"n": n, "text": random.Random(n).randbytes(20).hex()}).encode() + b"\n" for n in range(200)
)
ROWS = [json.loads(line) for line in LINES.splitlines()]


@pytest.mark.grid(keep=6)
@pytest.mark.parametrize("cut", [0.002, 0.1, 0.5, -9, -8, -1])
@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_packed_file_that_is_cut_off(tmp_path: Path, packed: str, cut: float) -> None:
    whole = PACKERS[packed](LINES)
    rows, [error] = read(
        write(tmp_path, f"a.jsonl{packed}", whole[: cut if cut < 0 else max(5, int(len(whole) * cut))])
    )
    assert rows == ROWS[: len(rows)]
    assert "end too early: the file is truncated" in error.message
    assert error.line == (len(rows) or None)


@pytest.mark.grid(each="garbage")
@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("garbage", [b"x", b"\xff" * 1000, b'{"n": 1}\n'])
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


@pytest.mark.grid(keep=6)
@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("cut", [4, 12, 0.5, -100, -8, -1])
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
    monkeypatch.setattr(text_rows, "MAX_ROW", 1 << 20)
    data = b'{"a": 1}\n' + b"\0" * (20 << 20) + b'\n{"a": 2}\n'
    for name, packed in (("a.jsonl.gz", gzip.compress(data, 1)), ("a.jsonl.zst", zstd(data))):
        rows, [error] = read(write(tmp_path, name, packed))
        assert rows == [{"a": 1}, {"a": 2}]
        assert (error.line, error.message) == (2, "a row of more than 64 MiB")


def test_a_line_without_an_end_ends_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "MAX_ROW", 1000)
    monkeypatch.setattr(text_rows, "CHUNK", 1000)
    monkeypatch.setattr(text_rows, "_MAX_LINE", 5 << 20)
    data = b'{"a": 1}\n' + b" " * (6 << 20) + b'\n{"a": 2}\n'
    rows, [error] = read(write(tmp_path, "a.jsonl.gz", gzip.compress(data, 1)))
    assert rows == [{"a": 1}]
    assert (error.line, error.message) == (2, "a row of more than 5 MiB; the rest of the file was not read")


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
    monkeypatch.setattr(text_rows, "MAX_ROW", 10_000)
    monkeypatch.setattr(text_rows, "CHUNK", 1000)
    rows, [error] = read(write(tmp_path, name, text))
    assert len(rows) == 1
    assert error.line == line
    assert "a row of more than 64 MiB" in error.message


def same_text(size: int, rows: int, **options: Any) -> bytes:
    import pyarrow
    import pyarrow.parquet

    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * size] * rows}), data, compression="zstd", **options)
    return data.getvalue()


@pytest.mark.grid
@pytest.mark.parametrize(
    ("options", "at_once"),
    [
        ({"use_dictionary": True}, 1),
        ({"use_dictionary": False}, 64),
        ({"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}, 1),
    ],
)
def test_a_text_that_all_rows_of_a_table_share_is_read_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], at_once: int
) -> None:
    monkeypatch.setattr(readers, "_MAX_BATCH", 1_500_000)
    path, sizes = write(tmp_path, "a.parquet", same_text(1_000_000, 70, **options)), []
    real = readers.table_rows
    monkeypatch.setattr(readers, "table_rows", lambda batch: sizes.append(len(batch)) or real(batch))
    rows, errors = read(path)
    assert (len(rows), errors) == (70, [])
    assert max(sizes) == at_once


def test_a_table_whose_texts_no_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_MAX_TEXT", 100_000)
    path = write(tmp_path, "a.parquet", same_text(200_000, 1))
    rows, [error] = read(path)
    assert rows == []
    assert error.message == "row group 1: a text of the column 'text' unpacks to more than 100,000 bytes"
    assert read(write(tmp_path, "a.parquet", same_text(90_000, 1)))[1] == []


def lists(path: Path, *columns: tuple[str, Any, int], **options: Any) -> Path:
    """A table of three rows. In each column, named so, the second is a list of one value, that many times."""
    import pyarrow
    import pyarrow.parquet

    table = {"text": pyarrow.array(["one", "two", "three"])}
    for name, value, times in columns:
        items = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * times, pyarrow.int32()), [value])
        items = items if isinstance(value, str) else items.dictionary_decode()
        table[name] = pyarrow.ListArray.from_arrays([0, 0, times, times], items)
    options = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30, "store_schema": False, **options}
    pyarrow.parquet.write_table(pyarrow.table(table), path, **options)
    return path


@pytest.mark.parametrize(
    "columns",
    [
        [("n", 1, 60_000)],
        [("n", None, 60_000)],
        [("n", "ab", 60_000)],
        [("n", "x" * 1000, 1100)],
        [("n", 1, 30_000), ("m", 1, 30_000)],
    ],
)
@pytest.mark.parametrize("store_schema", [True, False])
def test_a_row_of_a_table_that_no_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: list[tuple[str, Any, int]], store_schema: bool
) -> None:
    monkeypatch.setattr(readers, "_MAX_BATCH", 1_000_000)
    rows, [error] = read(lists(tmp_path / "a.parquet", *columns, store_schema=store_schema))
    assert [row["text"] for row in rows] == ["one", "three"]
    assert error.message.startswith("row 2: unpacks to about 1,")
    assert error.message.endswith(" bytes, more than 1,000,000")
    half = [(name, value, times // 2) for name, value, times in columns]
    rows, errors = read(lists(tmp_path / "a.parquet", *half, store_schema=store_schema))
    assert errors == []
    assert rows[1] == {"text": "two", **{name: [value] * times for name, value, times in half}}


@pytest.mark.slow
def test_a_small_table_whose_list_has_20_million_items(tmp_path: Path) -> None:
    import pyarrow

    path = lists(tmp_path / "a.parquet", ("n", "x" * 1_000_000, 3000))  # 3 GB, and none of them in memory
    before = pyarrow.default_memory_pool().max_memory()
    rows, [error] = read(path)
    assert error.message.startswith("row 2: unpacks to about 3,000,")
    assert pyarrow.default_memory_pool().max_memory() - before < 100 << 20
    assert path.stat().st_size < 3000
    values = pyarrow.array(memoryview(bytes(20_000_000)).cast("b")).cast(pyarrow.int8())
    write(tmp_path, "b.parquet", parquet(n=pyarrow.ListArray.from_arrays([0, 20_000_000], values)))
    rows, [error] = read(tmp_path / "b.parquet")
    assert rows == []
    assert error.message.startswith("row 1: unpacks to about 5")


def test_a_list_that_a_table_tells_beforehand_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_MAX_ITEMS", 1000)
    rows, [error] = read(lists(tmp_path / "a.parquet", ("n", 1, 2000)))
    assert rows == []
    assert "a row of the column 'n.list.element' may contain " in error.message
    assert error.message.endswith(" list items, more than 1,000")
    assert error.hint
    assert read(lists(tmp_path / "a.parquet", ("n", 1, 900)))[1] == []


def test_a_page_that_claims_to_unpack_to_gigabytes_is_not_unpacked(tmp_path: Path) -> None:
    data = bytearray(same_text(10, 3, use_dictionary=False))
    start = 4  # of the first page, behind PAR1: 0x15, kind, 0x15, size
    assert data[start] == data[start + 2] == 0x15
    assert data[start + 3] < 0x80
    data[start + 3 : start + 4] = b"\xfe\xff\xff\xff\x0f"  # 2**31 - 1
    path = write(tmp_path, "a.parquet", bytes(data))
    rows, [error] = read(path)
    assert rows == []
    assert "unpacks to more than 40,000,000 bytes" in error.message or "is not a parquet file" in error.message


# --- what is no file


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
        with pytest.raises(DataError, match="is a pipe, not a regular file"):
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

    def fails(self: text_rows.TextFile) -> Any:
        self.line = 3
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(text_rows.TextFile, "lines", fails)
    _, [error] = read(path)
    assert (error.line, error.message) == (3, "cannot be read: Input/output error")


# --- content: each of these is a file in order, and nothing that could be trained on


def first_example(path: Path) -> ParsedRow:
    source = Source(train=str(path))
    row = next(open_source(source).rows())
    if isinstance(row, DataError):
        raise row
    return example_reader(Table(source, str(path), tuple(row.values)))(row)


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


@pytest.mark.grid(keep=4)
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
