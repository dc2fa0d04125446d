"""What a good file gives: every kind of file, packed or not, row by row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_data import PACKERS, write, zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from peftcli.data import readers, text_rows
from peftcli.data.readers import kind_of, read_file
from peftcli.data.rows import Place, Row
from peftcli.errors import DataError

ROWS = [{"prompt": "één", "completion": "x"}, {"prompt": 'two\nlines, "so"', "completion": "😀"}]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    import pyarrow.parquet

    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data, **options)
    return data.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".jsonl": jsonl,
    ".ndjson": jsonl,
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    ".csv": as_csv,
    ".parquet": parquet,
}


def values(path: Path) -> list[dict[str, Any]]:
    rows = []
    for row in read_file(path, path.name):
        assert isinstance(row, Row), row
        rows.append(row.values)
    return rows


def lines(path: Path) -> list[int | None]:
    return [row.place.line if isinstance(row, Row) else row.line for row in read_file(path, path.name)]


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_packed_or_not(tmp_path: Path, kind: str, packed: str) -> None:
    path = write(tmp_path, f"A{kind.upper()}{packed}", PACKERS[packed](WRITERS[kind](ROWS)))
    assert values(path) == ROWS
    assert [list(row) for row in values(path)] == [["prompt", "completion"]] * 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", (".jsonl", "")),
        ("a.b.JSON.GZ", (".json", ".gz")),
        ("a.gz", None),
        ("a.jsonl.bz2", None),
        ("jsonl", None),
    ],
)
def test_kinds_are_told_by_name(name: str, kind: tuple[str, str] | None) -> None:
    assert kind_of(name) == kind


GOOD = {
    "a byte order mark, CRLF and blank lines": ("a.jsonl", '\ufeff{"a": "é"}\r\n\r\n  \t\n{"a": "b"}', [1, 4]),
    "unicode line separators in a string": (
        "a.jsonl",
        '{"a": "x\u2028y\u2029z\x85"}\n{"a": 1}\n',
        [1, 2],
    ),
    "a carriage return as JSON's white space": ("a.jsonl", '{"a":\r1}\n', [1]),
    "whole surrogate pairs": ("a.jsonl", '{"a": "\\ud83d\\ude00"}\n', [1]),
    "an escaped backslash before u": ("a.jsonl", '{"a": "\\\\ud800"}\n', [1]),
    "large and small numbers": ("a.jsonl", '{"a": 123456789012345678901234567890, "b": 1e308, "c": 1e-999}\n', [1]),
    "mixed types in a column": ("a.jsonl", '{"a": 1}\n{"a": "x"}\n{"a": null}\n{"b": []}\n', [1, 2, 3, 4]),
    "one key in two objects of a row": ("a.jsonl", '{"a": {"b": 1}, "b": {"b": 2}}\n', [1]),
    "100 levels": ("a.jsonl", '{"a": ' + "[" * 99 + "]" * 99 + "}\n", [1]),
    "objects a line in .json": ("a.json", '{"a": 1}\n\n{"a": 2}', [1, 3]),
    "a list over many lines": ("a.json", '\ufeff\n[\n{"a": 1}\n,\n\n{"a":\n2},{"a": 3}]\n\n', [3, 6, 7]),
    "a list on one line": ("a.json", '[{"a": 1}, {"a": 2}]', [1, None]),
    "quoted newlines": ("a.csv", 'a,b\r\n"one, ""two""",x\r\n\r\n"3\n4\r\n5",y\r\n6,7\r\n', [2, 4, 7]),
    "a byte order mark before a quote": ("a.csv", '\ufeff"a",b\n1,2\n', [2]),
    "carriage returns alone": ("a.csv", 'a,b\r1,2\r"3\r4",5\r', [2, 3]),
    "a field of 300,000 characters": ("a.csv", "a\n" + "x" * 300_000, [2]),
    "formulas": ("a.csv", "a,b\n=cmd|'/C calc'!A1,+1\n@SUM(1),-2\n", [2, 3]),
    "white space": ("a.csv", "a , b\n 1 , 2 \n", [2]),
    "a header alone": ("a.csv", "a,b\n", []),
    "unicode line separators in a field": ("a.csv", "a,b\nx\u2028y,z\x85\x0c\n", [2]),
}


@pytest.mark.grid(each="case")
@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("case", GOOD)
def test_odd_but_good(tmp_path: Path, case: str, packed: str) -> None:
    name, text, expected = GOOD[case]
    path = write(tmp_path, name + packed, PACKERS[packed](text.encode()))
    assert all(isinstance(row, Row) for row in read_file(path, name))
    assert lines(path) == expected


def test_csv_fields_stay_as_they_are_written(tmp_path: Path) -> None:
    rows = values(write(tmp_path, "a.csv", GOOD["formulas"][1]))
    assert rows == [{"a": "=cmd|'/C calc'!A1", "b": "+1"}, {"a": "@SUM(1)", "b": "-2"}]
    assert values(write(tmp_path, "b.csv", GOOD["white space"][1])) == [{"a": " 1 ", "b": " 2 "}]
    assert values(write(tmp_path, "c.csv", "a,b\n007,1e5\n"))[0] == {"a": "007", "b": "1e5"}
    assert values(write(tmp_path, "d.csv", ",a\n0,x\n")) == [{"a": "x"}]  # with the index that pandas writes
    assert values(write(tmp_path, "d.csv", GOOD["quoted newlines"][1]))[1] == {"a": "3\n4\r\n5", "b": "y"}


def test_a_place_says_source_number_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n\nbroken\n{"a": 2}\n')
    found = list(read_file(path, "the file"))
    assert [row.place for row in found if isinstance(row, Row)] == [Place("the file", 1, 1), Place("the file", 3, 4)]
    [error] = [row for row in found if isinstance(row, DataError)]
    assert (error.file, error.line) == ("the file", 3)
    [row, _] = read_file(write(tmp_path, "a.parquet", parquet(ROWS)), "p")
    assert isinstance(row, Row)
    assert row.place == Place("p", 1, None)


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("chunk", range(1, 25))
def test_a_list_can_be_cut_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(text_rows, "CHUNK", chunk)
    text = '\ufeff [ {"a": -1.5e+10, "é": [true, null, "\\u00e9\\ud83d\\ude00"]},\n{"b": 12345} , {} ]  '
    assert values(write(tmp_path, "a.json", text)) == json.loads(text[1:])


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_memory_holds_a_few_rows_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    for module in (text_rows, readers):
        monkeypatch.setattr(module, "CHUNK", 1 << 16)
    row = {"text": "x" * 1000, "more": "y" * 1000}
    path = write(tmp_path, f"a{kind}.gz", gzip.compress(WRITERS[kind]([row] * 5_000), 1))  # 10 MB
    tracemalloc.start()
    try:
        assert sum(isinstance(each, Row) for each in read_file(path, "a")) == 5_000
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_nothing_is_read_beyond_the_rows_that_are_taken(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": 2}\n' * 200_000)[:-100])
    rows = read_file(path, "a")
    assert [next(rows), next(rows)] == [Row({"a": 1}, Place("a", 1, 1)), Row({"a": 2}, Place("a", 2, 2))]
    rows.close()


def test_packed_files_of_several_parts(tmp_path: Path) -> None:
    one, two = jsonl(ROWS[:1]), jsonl(ROWS[1:])
    assert values(write(tmp_path, "a.jsonl.gz", gzip.compress(one) + gzip.compress(two))) == ROWS
    assert values(write(tmp_path, "a.jsonl.zst", zstd(one) + zstd(two))) == ROWS
    assert values(write(tmp_path, "b.jsonl.gz", gzip.compress(one + two) + b"\0" * 512)) == ROWS  # as tapes pad


def test_parquet_in_row_groups_and_of_several_types(tmp_path: Path) -> None:
    rows = [
        {"n": n, "messages": [{"role": "user", "content": str(n)}], "x": None if n % 2 else 1.5} for n in range(150)
    ]
    assert values(write(tmp_path, "a.parquet", parquet(rows, row_group_size=7, write_page_checksum=True))) == rows


def test_a_table_gives_the_rows_that_its_json_would(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    texts = pa.array(['"hi"', "5", '{"a": null}', None], pa.json_())
    inside = [texts, pa.nulls(4, pa.string()), pa.array([[1, None]] * 4)]
    objects = pa.StructArray.from_arrays(inside, ["json", "absent", "flat"])
    maps = [[("a", {"b": 1, "c": None})], [("a", None)], [], None]
    kind = pa.map_(pa.string(), pa.struct({"b": pa.int64(), "c": pa.int64()}))
    columns = {"json": texts, "list": pa.ListArray.from_arrays([0, 1, 2, 3, 4], objects), "map": pa.array(maps, kind)}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == [
        {"json": "hi", "list": [{"json": "hi", "flat": [1, None]}], "map": {"a": {"b": 1}}},
        {"json": 5, "list": [{"json": 5, "flat": [1, None]}], "map": {"a": None}},
        {"json": {"a": None}, "list": [{"json": {"a": None}, "flat": [1, None]}], "map": {}},
        {"json": None, "list": [{"flat": [1, None]}], "map": None},
    ]


def test_a_row_of_64_mib_is_the_longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert text_rows.MAX_ROW == 64 << 20
    monkeypatch.setattr(text_rows, "MAX_ROW", 1000)
    fits = '{"a": "' + "x" * 991 + '"}'
    assert len(fits) == 1000
    text = f'{fits}\r\n{fits[:-2]}x"}}\n{fits}\n{fits}x'
    found = list(read_file(write(tmp_path, "a.jsonl", text), "a"))
    assert [isinstance(row, Row) for row in found] == [True, False, True, False]
    assert [str(row) for row in found if isinstance(row, DataError)] == [
        f"a:{n}: a row of more than 64 MiB" for n in (2, 4)
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), json_values, max_size=4), max_size=5),
    indent=st.sampled_from([None, 1]),
    escape=st.booleans(),
    packed=st.sampled_from(["", ".gz"]),
)
def test_any_rows_of_json_come_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], indent: int | None, escape: bool, packed: str
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    whole = json.dumps(rows, indent=indent, ensure_ascii=escape)
    each = "".join(json.dumps(row, ensure_ascii=escape) + "\n" for row in rows) or " "
    for name, text in (("a.json", whole), ("a.jsonl", each)):
        assert values(write(folder, name + packed, PACKERS[packed](text.encode()))) == rows


@settings(max_examples=60)
@given(
    rows=st.lists(
        st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=2, max_size=2),
        max_size=5,
    ),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_any_rows_of_csv_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], end: str) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *rows])
    path = write(tmp_path_factory.mktemp("rows"), "a.csv", text.getvalue())
    assert values(path) == [dict(zip("ab", row, strict=True)) for row in rows]
