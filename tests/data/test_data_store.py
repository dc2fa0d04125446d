"""Features on disk: what is written is what is read, and damage is found."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from examplekit import COLUMNS, Ids, outcome, plain

from peftcli.data import store as store_module
from peftcli.data.rows import BAD, USED, Place
from peftcli.data.store import Column, Example, Outcome, Selection, Store, View, Writer
from peftcli.errors import DataError, StorageError

Write = Callable[..., Store]


def feature(first: int, length: int) -> Ids:
    ids = list(range(first, first + length))
    return {"input_ids": ids, "labels": [-100, *ids[1:]][:length]}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a store of these outcomes, so many rows at a time."""

    def write(outcomes: Sequence[Outcome | DataError], name: str = "store", at_once: int = 2) -> Store:
        folder = tmp_path / name
        folder.mkdir()
        places = [Place(f"part-{index % 2}.jsonl", index + 1, 10 * index + 1) for index in range(len(outcomes))]
        with Writer(folder, COLUMNS) as writer:
            for start in range(0, len(outcomes), at_once):
                writer.add(places[start : start + at_once], outcomes[start : start + at_once])
            writer.finish(format="text", counts={"a": 1})
        return Store(folder)

    return write


MIXED: list[Outcome | DataError] = [
    outcome([feature(0, 5)], [4], tokens=5, flags=3),
    Outcome(reason="too long", size=2000),
    DataError("no \x1b text", file="part-0.jsonl", line=21, key="text", hint="add it"),
    outcome([feature(10, 3), feature(20, 1)], [2, 0], tokens=9, lost=5),
    outcome([feature(30, 0)], [0]),
]
FEATURES = [feature(0, 5), feature(10, 3), feature(20, 1), feature(30, 0)]


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_what_is_written_is_read(write: Write, at_once: int) -> None:
    store = write(MIXED, at_once=at_once)
    assert list(map(plain, store)) == FEATURES
    assert (store.columns, store.about) == (COLUMNS, {"format": "text", "counts": {"a": 1}, "common": {}})
    assert (store.sizes.tolist(), store.targets.tolist(), store.row_of.tolist()) == (
        [5, 3, 1, 0], [4, 2, 0, 0], [0, 3, 3, 4],
    )  # fmt: skip
    assert [store.outcomes[index] for index in store.rows["outcome"]] == [USED, "too long", BAD, USED, USED]
    assert store.rows["size"].tolist() == [5, 2000, 0, 9, 0]
    assert store.rows["lost"].tolist() == [0, 0, 0, 5, 0]
    assert store.rows["flags"].tolist() == [3, 0, 0, 0, 0]
    assert [store.place(row) for row in (0, 3)] == [Place("part-0.jsonl", 1, 1), Place("part-1.jsonl", 4, 31)]
    [(row, error)] = store.bad_rows()
    refused = MIXED[2]
    assert isinstance(refused, DataError)
    assert (row, error.as_dict()) == (2, refused.as_dict())


@pytest.mark.parametrize("outcomes", [[], [Outcome(reason="too long")] * 3])
def test_without_features(write: Write, outcomes: list[Outcome]) -> None:
    store = write(outcomes)
    assert (len(store), list(store), len(store.rows)) == (0, [], len(outcomes))
    assert [len(array) for array in (store.sizes, store.targets, store.row_of)] == [0, 0, 0]
    view = View([Selection(store), Selection(store, np.zeros(0, np.int64))])
    assert (len(view), view.counts, view.sizes.tolist(), view.targets.tolist()) == (0, [0, 0], [], [])
    with pytest.raises(IndexError):
        view[0]


@pytest.mark.parametrize("kind", ["store", "view"])
def test_indices_are_those_of_a_list(write: Write, kind: str) -> None:
    store = write(MIXED)
    found = store if kind == "store" else View([Selection(store)])
    for index in (0, 3, np.int64(2)):
        assert plain(found[index]) == FEATURES[operator.index(index)]
    with pytest.raises(IndexError):
        found[4]


def test_arrays_cannot_be_changed(write: Write) -> None:
    with pytest.raises(ValueError, match="read-only"):
        write(MIXED, "other").value("input_ids", 0)[0] = 1


def test_offsets_have_64_bits(write: Write) -> None:
    store = write([outcome([feature(1, 3)], [2]), outcome([feature(5, 2)], [1])])
    far = 2**31 + 7
    ids, ends, manifest = (store.folder / name for name in ("input_ids.ids.bin", "input_ids.ends.bin", "MANIFEST.json"))
    with ids.open("r+b") as file:  # a file with a hole: it takes no room
        file.seek(4 * far)
        file.write(np.array([5, 6], "<i4").tobytes())
    np.array([far, far + 2], "<i8").tofile(ends)
    listed = json.loads(manifest.read_text())
    listed["files"][ids.name]["bytes"] = 4 * (far + 2)
    manifest.write_text(json.dumps(listed))
    store = Store(store.folder, verify=False)
    assert store[1].arrays["input_ids"].tolist() == [5, 6]


def test_offsets_go_on_beyond_32_bits(tmp_path: Path) -> None:
    with Writer(tmp_path, {"input_ids": Column()}) as writer:
        writer._ends["input_ids"] = 2**31 - 1  # as after so many ids
        writer.add([Place("a", 1)] * 2, [outcome([{"input_ids": [1, 2]}], [1])] * 2)
    assert np.fromfile(tmp_path / "input_ids.ends.bin", "<i8").tolist() == [2**31 + 1, 2**31 + 3]


def test_pages_that_were_given_back_are_read_again(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_HELD", 0)
    store = write(MIXED)
    first = store.value("input_ids", 0)
    assert list(map(plain, [*store, *store])) == FEATURES * 2
    assert first.tolist() == FEATURES[0]["input_ids"]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << position % 8
    path.write_bytes(data)


NAMES = ["rows.bin", "features.bin", "input_ids.ids.bin", "input_ids.ends.bin", "labels.ids.bin", "labels.ends.bin"]
NAMES += ["bad.jsonl", "store.json"]


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_found(write: Write, name: str) -> None:
    store = write(MIXED)
    path = store.folder / name
    good = path.read_bytes()
    for position in (0, len(good) // 2, len(good) - 1):
        flip(path, position)
        with pytest.raises(ValueError, match=f"{name} has changed"):
            Store(store.folder)
        if name == "store.json":
            with pytest.raises(ValueError, match="has changed"):
                Store(store.folder, verify=False)
        else:
            Store(store.folder, verify=False)
        path.write_bytes(good)
    for wrong in (good[:-1], good + b"\0", b"", good[4:] + good[:4]):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=name):
            Store(store.folder)
    path.unlink()
    with pytest.raises(ValueError, match=name):
        Store(store.folder)
    path.write_bytes(good)
    assert list(map(plain, Store(store.folder))) == FEATURES


def test_a_damaged_manifest_is_found_or_says_the_same(write: Write) -> None:
    store = write(MIXED)
    path = store.folder / "MANIFEST.json"
    good = path.read_bytes()
    refused = 0
    for position in range(0, len(good), 7):
        flip(path, position)
        try:
            assert list(map(plain, Store(store.folder))) == FEATURES
        except ValueError:
            refused += 1
        path.write_bytes(good)
    assert refused > len(good) / 14
    for wrong in (b"", b"[]", b"{}", b'{"files": []}', b'{"files": {"rows.bin": 1}}', b"\xff", good[:-20]):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="store"):
            Store(store.folder)


def test_another_layout_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write(MIXED)
    monkeypatch.setattr(store_module, "FORMAT", store_module.FORMAT + 1)
    with pytest.raises(ValueError, match="another layout"):
        Store(store.folder)


def test_a_store_that_was_not_finished_is_none(tmp_path: Path) -> None:
    with Writer(tmp_path, {"input_ids": Column()}) as writer:
        writer.add([Place("a", 1)], [outcome([{"input_ids": [1]}], [1])])
    with pytest.raises(ValueError, match="no whole store"):
        Store(tmp_path)


@pytest.mark.parametrize("name", ["rows.bin", "labels.ids.bin", "store.json", "MANIFEST.json"])
def test_a_full_disk_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/full")

    def write() -> None:
        with Writer(tmp_path, COLUMNS) as writer:
            writer.add([Place("a", 1)], [MIXED[0]])
            writer.finish()

    with pytest.raises(StorageError, match="No space left") as caught:
        write()
    assert caught.value.file == str(tmp_path)
    assert not (tmp_path / "MANIFEST.json").is_file()  # so it is no store


def test_a_view_of_some_rows_of_several_stores(write: Write) -> None:
    one, two = write(MIXED, "one"), write([outcome([feature(50, 2)], [1]), outcome([feature(60, 4)], [3])], "two")
    view = View(
        [
            Selection(one, np.array([3, 1])),
            Selection(two, np.zeros(0, int)),
            Selection(two),
            Selection(one, np.array([0])),
        ]
    )
    assert list(map(plain, view)) == [feature(10, 3), feature(20, 1), feature(50, 2), feature(60, 4), feature(0, 5)]
    assert view.counts == [2, 0, 2, 1]
    assert (view.sizes.tolist(), view.targets.tolist()) == ([3, 1, 2, 4, 5], [2, 0, 1, 3, 4])
    assert [view.locate(index) for index in (1, 2, 4)] == [(one, 2), (two, 0), (one, 0)]
    assert view.parts[0].records["number"].tolist() == [4, 2]
    assert view.parts[2].records["number"].tolist() == [1, 2]


# --- typed columns ----------------------------------------------------------------------------------------------------

COLUMNS_OF_KINDS = {
    "ids": Column(),
    "class": Column("int64", ()),
    "score": Column("float32", ()),
    "box": Column("int16", (4,)),
    "frames": Column("float32", (None, 3)),
    "grid": Column("uint8", (None, None, 2)),
    "kept": Column("bool", ()),
    "path": Column("str", ()),
    "file": Column("bytes", ()),
}


def arrays(size: int) -> dict[str, Any]:
    return {
        "ids": list(range(size)),
        "class": size,
        "score": size / 2,
        "box": [size, -1, 0, 32767],
        "frames": np.arange(3.0 * size).reshape(size, 3),
        "grid": np.full((size, size + 1, 2), size),
        "kept": size % 2 == 0,
        "path": f"pictures/{size}-ü{os.fsdecode(bytes([0xE9]))}.png",
        "file": bytes(range(size)),
    }


def test_columns_of_every_kind_are_read_as_they_were_written(tmp_path: Path) -> None:
    sizes = [3, 0, 5, 1]
    with Writer(tmp_path, COLUMNS_OF_KINDS) as writer:
        for number, size in enumerate(sizes, start=1):
            writer.add([Place("a", number)], [Outcome([Example(arrays(size), size, 1)])])
        writer.finish()
    store = Store(tmp_path)
    assert store.columns == COLUMNS_OF_KINDS
    assert store.sizes.tolist() == sizes
    for size, found in zip(sizes, store, strict=True):
        for name, wanted in arrays(size).items():
            value = found.arrays[name]
            if isinstance(wanted, (str, bytes)):
                assert value == wanted
            else:
                assert value.dtype == np.dtype(COLUMNS_OF_KINDS[name].dtype)
                assert value.shape == np.shape(wanted)
                assert np.array_equal(value, np.asarray(wanted).astype(value.dtype))
    for name, column in COLUMNS_OF_KINDS.items():
        each = [np.asarray(column.fit(arrays(size)[name])).ravel() for size in sizes[1:3]]
        values, lengths = store.values(name, 1, 3)
        assert np.array_equal(values, np.concatenate(each), equal_nan=values.dtype.kind == "f")
        assert lengths.tolist() == list(map(len, each))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (Column("int32", ()), 1.7),
        (Column("int32", ()), float("nan")),
        (Column("int32", ()), 2**31),
        (Column("uint8", ()), -1),
        (Column("int32", ()), None),
        (Column("int32", ()), "7"),
        (Column("int32"), 7),
        (Column("int32"), [[1], [2]]),
        (Column("float32", ()), 1e39),
        (Column("float32", (None, 3)), np.zeros((2, 4))),
        (Column("bool", ()), 2),
        (Column("str", ()), b"a"),
        (Column("bytes", ()), "a"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_its_row(tmp_path: Path, column: Column, value: Any) -> None:
    with (
        Writer(tmp_path, {"x": column}) as writer,
        pytest.raises(DataError, match="does not fit the column 'x'") as caught,
    ):
        writer.add([Place("a.jsonl", 7, 9)], [Outcome([Example({"x": value}, 1, 1)])])
    assert (caught.value.file, caught.value.line) == ("a.jsonl", 9)


def test_a_value_that_fits_exactly_is_taken(tmp_path: Path) -> None:
    assert Column("int32", ()).fit(3.0) == 3
    assert Column("float32", ()).fit(float("inf")) == np.inf
    assert np.isnan(Column("float32", ()).fit(float("nan")))
    assert Column("uint8").fit([]).tolist() == []


def test_the_content_of_token_ids_is_that_of_layout_1(write: Write) -> None:
    """A run that began before goes on: its hash over what it is trained on has not changed."""
    listed = json.loads((write(MIXED).folder / "MANIFEST.json").read_bytes())["files"]
    assert {"features.bin", "input_ids.ids.bin", "input_ids.ends.bin", "labels.ids.bin", "labels.ends.bin"} <= set(
        listed
    )
    assert listed["input_ids.ids.bin"]["bytes"] == 4 * 9
    assert listed["features.bin"]["bytes"] == 12 * 4
