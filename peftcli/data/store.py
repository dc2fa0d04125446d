"""The examples of one dataset on disk, read through memory maps, and a record of what became of each row.

A store is a folder: ``store.json`` describes it, the other files are plain arrays. ``MANIFEST.json``, written last, has
the size and checksum of each, so that a flipped bit is found when the store is opened. A dataset larger than memory
fits, since only the pages that are read are held, and not for long.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from peftcli.data.rows import BAD, USED, Place, shortened
from peftcli.errors import DataError
from peftcli.system.outputs import storage_errors

FORMAT = 3
"""Changes with the layout below."""
MANIFEST, DESCRIPTION = "MANIFEST.json", "store.json"
_BAD_ROWS = "bad.jsonl"

_ROW = np.dtype(
    [
        ("number", "<i8"),
        ("line", "<i8"),  # 0: none
        ("file", "<i4"),  # index into the description's files
        ("outcome", "<i4"),  # index into the description's outcomes
        ("flags", "<i4"),
        ("size", "<i8"),  # before any cut
        ("lost", "<i4"),  # targets that a cut took away
        ("group", "<u8"),  # hash of its value in dataset.group_by; 0: none
        ("shared", "<u8"),  # hash of the part of its input that other rows may have too; 0: none
    ]
)
_EXAMPLE = np.dtype([("row", "<i8"), ("targets", "<i4")])
_SIZE, _END, _EDGE = np.dtype("<i8"), np.dtype("<i8"), np.dtype("<i4")
_BLOCK = 1 << 20
"""Bytes that are checked at once."""
_HELD, _AROUND = 64 << 20, 1 << 20
"""Bytes of the maps that are read before their pages are given back to the system, which keeps them while it has room;
bytes that it may map around those of one read."""


@dataclass(frozen=True)
class Column:
    """One array of every example. The writer refuses a value that does not fit.

    Values of ``str`` and ``bytes`` have no shape: a text to compare with, the path or the bytes of a file that collate
    reads.
    """

    dtype: str = "int32"
    """A number format of numpy, ``str`` or ``bytes``."""
    shape: tuple[int | None, ...] = (None,)
    """Its edges; None: differs from example to example. (): a scalar."""

    @property
    def is_text(self) -> bool:
        """Whether values are a ``str`` or ``bytes`` instead of an array."""
        return self.dtype in ("str", "bytes")

    @property
    def stored(self) -> np.dtype:
        """How its elements stand in the file."""
        return np.dtype("uint8" if self.is_text else self.dtype).newbyteorder("<")

    @property
    def varying(self) -> int:
        """How many edges differ from example to example."""
        return self.shape.count(None)

    @property
    def has_ends(self) -> bool:
        """Whether examples differ in how many elements they have."""
        return self.is_text or self.varying > 0

    def fit(self, value: Any) -> np.ndarray:
        """A value as the file holds it.

        Raises:
            ValueError: it is of another kind or shape, or not exactly a value of the number format.
        """
        if self.is_text:
            wanted = str if self.dtype == "str" else bytes
            if not isinstance(value, wanted):
                raise ValueError(f"{shortened(value)} is no {self.dtype}")
            # Paths of Linux are bytes, which Python reads as text so that they come back.
            held = value.encode(errors="surrogateescape") if isinstance(value, str) else value
            return np.frombuffer(held, np.uint8)
        found = np.asarray(value)
        if not found.size and found.dtype == np.float64:  # an empty list
            found = found.astype(self.stored)
        if found.dtype.kind not in "biuf":
            raise ValueError(f"{shortened(value)} is no {self.dtype}")
        fits = found.ndim == len(self.shape) and all(
            edge in (None, given) for edge, given in zip(self.shape, found.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"an array of shape {found.shape} where {self.shape} is wanted")
        with np.errstate(invalid="ignore", over="ignore"):
            cast = found.astype(self.stored)
        if found.dtype == cast.dtype:
            return cast
        if cast.dtype.kind == "f":
            wrong = np.isfinite(found) & ~np.isfinite(cast)
        elif cast.dtype.kind == "b":
            wrong = (found != 0) & (found != 1)
        else:
            limits = np.iinfo(cast.dtype)
            wrong = ~((found >= limits.min) & (found <= limits.max)) | (cast != found)
        if wrong.any():
            raise ValueError(f"{found[wrong].flat[0]!r} is no {self.dtype}")
        return cast


@dataclass
class Example:
    """An example of a row, as it is stored and put into batches."""

    arrays: dict[str, Any]
    """One value for each of the task's columns. A list where the task has just made it, an array (or str, bytes) when
    it comes from a store."""
    size: int
    """Its cost in the task's unit (tokens, frames, patches): for order, packing, limits and speed."""
    num_targets: int
    """Number of targets, by which its share of the loss is divided."""
    draw: int = 0
    """By which a task draws random numbers of its own for the example: another number at each step of training and
    place in its batch, however the batch is split; 0 in evaluation, which draws the same each time."""


@dataclass(slots=True)
class Outcome:
    """The result of encoding one row."""

    examples: list[Example] = field(default_factory=list)
    """None where the row is left out; several where it was split."""
    reason: str = USED
    """Why the row is left out, or ``used``."""
    size: int = 0
    """Of the row in the task's unit, before any cut."""
    lost: int = 0
    """Targets that a cut took away."""
    flags: int = 0
    """What else is known of the row, as bits whose meaning is the task's."""
    common: Mapping[str, str] = field(default_factory=dict)
    """Texts that other rows may have too. The store keeps those that all used rows have."""
    group: int = 0
    """A hash of its value in ``dataset.group_by``; 0: none."""
    shared: int = 0
    """A hash of the part of its input that other rows may have too, with another answer; 0: none."""


class Writer:
    """Writes a store into an empty folder, a batch of rows at a time.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """

    def __init__(self, folder: Path, columns: Mapping[str, Column]):
        self.folder, self.columns = folder, dict(columns)
        self.outcomes, self.files = {USED: 0, BAD: 1}, dict[str, int]()
        self._common: Mapping[str, str] | None = None
        self.num_rows = self.num_examples = self.size = 0
        self._ends = dict.fromkeys(self.columns, 0)
        arrays = ["rows", "features", "sizes", *(file for name in self.columns for file in _arrays_of(name))]
        with storage_errors(folder):
            self._open = {name: _File(folder / name) for name in (*map(_file, arrays), _BAD_ROWS)}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_error: object) -> None:
        for file in self._open.values():
            file.close()

    def add(self, places: Sequence[Place], results: Sequence[Outcome | DataError]) -> None:
        """The next rows, and what became of each."""
        rows = np.zeros(len(places), _ROW)
        examples: list[Example] = []
        records: list[tuple[int, int]] = []
        values: dict[str, list[np.ndarray]] = {name: [] for name in self.columns}
        bad: list[str] = []
        for index, (place, result) in enumerate(zip(places, results, strict=True)):
            file = self.files.setdefault(place.source, len(self.files))
            if isinstance(result, DataError):
                bad.append(json.dumps({"row": self.num_rows + index, **result.as_dict()}) + "\n")
                rows[index] = (place.number, place.line or 0, file, self.outcomes[BAD], 0, 0, 0, 0, 0)
                continue
            if result.reason == USED and self._common != result.common:
                known = result.common if self._common is None else self._common
                self._common = {name: text for name, text in known.items() if result.common.get(name) == text}
            outcome = self.outcomes.setdefault(result.reason, len(self.outcomes))
            rows[index] = (
                place.number, place.line or 0, file, outcome, result.flags, result.size, result.lost,
                result.group, result.shared,
            )  # fmt: skip
            for example in result.examples:
                assert example.arrays.keys() == values.keys()
                for name, column in self.columns.items():
                    try:
                        values[name].append(column.fit(example.arrays[name]))
                    except ValueError as error:
                        raise place.error(f"does not fit the column {name!r}: {error}") from None
                examples.append(example)
                records.append((self.num_rows + index, example.num_targets))
        with storage_errors(self.folder):
            self._write("rows", rows)
            self._write("features", np.array(records, _EXAMPLE))
            self._write("sizes", np.array([example.size for example in examples], _SIZE))
            self._open[_BAD_ROWS].write("".join(bad).encode())
            for name, column in self.columns.items():
                ids, ends, edges = _arrays_of(name)
                self._write(ids, np.concatenate([np.zeros(0, column.stored), *(each.ravel() for each in values[name])]))
                if column.has_ends:
                    counts = [each.size for each in values[name]]
                    self._write(ends, np.cumsum(counts, dtype=_END) + self._ends[name])
                if column.varying > 1:
                    self._write(edges, np.array([each.shape for each in values[name]], _EDGE))
                self._ends[name] += sum(each.size for each in values[name])
        self.num_rows, self.num_examples = self.num_rows + len(places), self.num_examples + len(examples)
        self.size += sum(example.size for example in examples)

    def finish(self, **about: Any) -> None:
        """The description and the manifest, last: a folder without them is no store. ``about`` is kept as it is."""
        described = {
            "format": FORMAT,
            "columns": {name: asdict(column) for name, column in self.columns.items()},
            "rows": self.num_rows,
            "examples": self.num_examples,
            "size": self.size,
            "outcomes": list(self.outcomes),
            "files": list(self.files),
            "about": {**about, "common": self._common or {}},
        }
        with storage_errors(self.folder):
            self._open[DESCRIPTION] = _File(self.folder / DESCRIPTION)
            self._open[DESCRIPTION].write(json.dumps(described, indent=1).encode())
            for file in self._open.values():
                file.flush()
            listed = {name: {"bytes": file.size, "crc32": file.crc32} for name, file in self._open.items()}
            (self.folder / MANIFEST).write_text(json.dumps({"files": listed}, indent=1), encoding="utf-8")

    def _write(self, name: str, array: np.ndarray) -> None:
        self._open[_file(name)].write(array.tobytes())


class _File:
    """A file that is written from beginning to end, and the size and checksum of what was written."""

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self.size = self.crc32 = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.size, self.crc32 = self.size + len(data), zlib.crc32(data, self.crc32)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # nothing is left to write in a store that was finished
            self._file.close()


class Store:
    """A store that was written: its examples by their positions.

    Raises:
        ValueError: the folder holds no whole store of this layout, or one whose bytes have changed.
    """

    def __init__(self, folder: Path, *, verify: bool = True):
        self.folder = folder
        described = describe(folder, verify=verify)
        self.columns = {
            name: Column(each["dtype"], tuple(each["shape"])) for name, each in described["columns"].items()
        }
        self.outcomes: list[str] = described["outcomes"]
        self.files: list[str] = described["files"]
        self.about: dict[str, Any] = described["about"]
        self._maps: list[mmap.mmap] = []
        self._read = 0
        self.rows = self._mapped("rows", _ROW)
        """A record a row: number, line, file, outcome, flags, size, lost, group, shared."""
        self._records = self._mapped("features", _EXAMPLE)
        self.sizes = self._mapped("sizes", _SIZE)
        """Of each example, in the task's unit."""
        self._ids, self._edges = dict[str, np.ndarray](), dict[str, np.ndarray]()
        self._ends = dict[str, np.ndarray | range]()
        for name, column in self.columns.items():
            ids, ends, edges = _arrays_of(name)
            self._ids[name], self._ends[name] = self._mapped(ids, column.stored), self._mapped(ends, _END)
            if not column.has_ends:  # all are of one size, so no file says where they end
                size = math.prod(edge or 0 for edge in column.shape)
                self._ends[name] = range(size, size * len(self) + 1, size)
            self._edges[name] = self._mapped(edges, _EDGE).reshape(-1, max(1, len(column.shape)))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        size, targets = int(self.sizes[index]), int(self._records["targets"][index])
        return Example({name: self.value(name, index) for name in self.columns}, size, targets)

    def lengths(self, column: str) -> np.ndarray:
        """Elements that each example has in one column."""
        return np.diff(np.asarray(self._ends[column], _END), prepend=0)

    def value(self, column: str, index: int) -> Any:
        """One column of one example: an array, without a copy, or a str or bytes."""
        kind, ends = self.columns[column], self._ends[column]
        found = self._elements(column, ends[index - 1] if index else 0, ends[index])
        if kind.is_text:
            held = found.tobytes()
            return held.decode(errors="surrogateescape") if kind.dtype == "str" else held
        if kind.varying > 1:
            return found.reshape(self._edges[column][index])
        return found.reshape([-1 if edge is None else edge for edge in kind.shape])

    def values(self, column: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """One column of adjacent examples: its elements without a copy, and how many each example has."""
        ends, first = self._ends[column][start:stop], self._ends[column][start - 1] if start else 0
        return self._elements(column, int(first), int(ends[-1])), np.diff(ends, prepend=first)

    def _elements(self, column: str, start: int, end: int) -> np.ndarray:
        """Part of a column's file. After many of them, the memory that they took is given back."""
        found: np.ndarray = self._ids[column][start:end]
        self._read += found.nbytes + _AROUND
        if self._read > _HELD:
            self._read = 0
            for each in self._maps:
                each.madvise(mmap.MADV_DONTNEED)
        return found

    def _mapped(self, name: str, dtype: np.dtype) -> np.ndarray:
        """An array's file; an empty one cannot be mapped."""
        with (self.folder / _file(name)).open("rb") as file:
            if not file.seek(0, 2):
                return np.zeros(0, dtype)
            self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return np.frombuffer(self._maps[-1], dtype)

    @property
    def targets(self) -> np.ndarray:
        """Targets of each example."""
        return np.asarray(self._records["targets"])

    @property
    def row_of(self) -> np.ndarray:
        """The row, counted from 0, that each example came from."""
        return np.asarray(self._records["row"])

    @property
    def content(self) -> str:
        """A hash over what the examples hold: two stores with the same are trained alike."""
        listed = json.loads((self.folder / MANIFEST).read_bytes())["files"]
        kinds = (".ids.bin", ".ends.bin", "features.bin")
        held = {
            name: said
            for name, said in listed.items()
            if name.endswith(kinds) or (name.endswith(".edges.bin") and said["bytes"])
        }
        return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()

    def place(self, row: int) -> Place:
        """Return the place of a row, counted from 0."""
        record = self.rows[row]
        return Place(self.files[record["file"]], int(record["number"]), int(record["line"]) or None)

    def bad_rows(self) -> Iterator[tuple[int, DataError]]:
        """The rows that cannot be used, with what is wrong with each."""
        with (self.folder / _BAD_ROWS).open(encoding="utf-8") as file:
            for line in file:
                entry = json.loads(line)
                row, message = entry.pop("row"), entry.pop("message")
                entry.pop("kind")
                yield row, DataError(message, **entry)


@dataclass(frozen=True)
class Selection:
    """Some rows of a store."""

    store: Store
    chosen: np.ndarray | None = None
    """Their positions, counted from 0, in order; None: all."""

    @property
    def records(self) -> np.ndarray:
        """The records of the rows."""
        return self.store.rows if self.chosen is None else self.store.rows[self.chosen]

    @property
    def content(self) -> str:
        """A hash over what their examples hold, and over which rows they are."""
        if self.chosen is None:
            return self.store.content
        return hashlib.sha256(self.store.content.encode() + self.chosen.astype("<i8").tobytes()).hexdigest()

    @property
    def mask(self) -> np.ndarray:
        """Which rows of the store they are."""
        mask = np.ones(len(self.store.rows), bool)
        if self.chosen is not None:
            mask[:] = False
            mask[self.chosen] = True
        return mask

    @property
    def columns_not_read(self) -> set[str]:
        """Columns of the source that the task does not read."""
        return set(self.store.about.get("columns_not_read", ()))

    @property
    def examples(self) -> np.ndarray:
        """Positions of their examples in the store."""
        if self.chosen is None:
            return np.arange(len(self.store))
        return np.flatnonzero(self.mask[self.store.row_of])

    def rows_at(self, file: str, number: int, *, is_line: bool) -> np.ndarray:
        """Return the positions in the store of the selected rows with this number in a file, or with this first line.

        The rows of a file without lines are always known by their numbers.
        """
        store, rows = self.store, self.store.rows
        of_file = rows["file"] == (store.files.index(file) if file in store.files else -1)
        key = "line" if is_line and rows["line"][of_file].any() else "number"
        return np.flatnonzero((rows[key] == number) & self.mask & of_file)

    def bad_rows(self) -> Iterator[tuple[int, DataError]]:
        """Yield the selected rows that cannot be used, by their positions in the store."""
        mask = self.mask
        return ((row, error) for row, error in self.store.bad_rows() if mask[row])


class View:
    """The examples of some rows of some stores, one after another."""

    def __init__(self, parts: Sequence[Selection]):
        """Reads the sizes, not the examples."""
        self.parts = list(parts)
        self._chosen = [part.examples for part in self.parts]
        self._starts = list(accumulate(map(len, self._chosen), initial=0))
        pairs = list(zip(self.parts, self._chosen, strict=True))
        self.sizes = _joined(part.store.sizes[chosen] for part, chosen in pairs)
        """Of each example, in the task's unit."""
        self.targets = _joined(part.store.targets[chosen] for part, chosen in pairs)
        """Targets of each example."""

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def counts(self) -> list[int]:
        """Examples of each part."""
        return [len(chosen) for chosen in self._chosen]

    def __getitem__(self, index: int) -> Example:
        store, position = self.locate(index)
        return store[position]

    def locate(self, index: int) -> tuple[Store, int]:
        """The store of an example, and its position there."""
        part = bisect_right(self._starts, index) - 1
        return self.parts[part].store, int(self._chosen[part][index - self._starts[part]])

    def scalars(self, column: str) -> np.ndarray:
        """Return one column of all examples, whose values are scalars."""
        pairs = [each for each in zip(self.parts, self._chosen, strict=True) if len(each[1])]
        return _joined(part.store.values(column, 0, len(part.store))[0][chosen] for part, chosen in pairs)

    def place(self, index: int) -> Place:
        """Return the place of an example's row."""
        store, position = self.locate(index)
        return store.place(int(store.row_of[position]))


def describe(folder: Path, *, verify: bool) -> dict[str, Any]:
    """Return the description that ``Writer.finish`` wrote, after a check of the sizes of the files.

    With ``verify`` the files are read too, and compared with their checksums.

    Raises:
        ValueError: the folder holds no whole store of this layout.
    """
    try:
        for name, said in json.loads((folder / MANIFEST).read_bytes())["files"].items():
            path = folder / name
            changed = path.stat().st_size != said["bytes"]
            if changed or ((verify or name == DESCRIPTION) and _crc32(path) != said["crc32"]):
                raise ValueError(f"{name} has changed")
        described: dict[str, Any] = json.loads((folder / DESCRIPTION).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no whole store in {folder}: {error}") from error
    if described["format"] != FORMAT:
        raise ValueError(f"the store in {folder} is of another layout")
    return described


def _crc32(path: Path) -> int:
    """A checksum for damage, not for malice: whoever can change an array can change the manifest."""
    checksum = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _file(name: str) -> str:
    return f"{name}.bin"


def _arrays_of(column: str) -> tuple[str, str, str]:
    """The files of a column: the elements of all examples, where each example ends, the edges of each.

    The first two are named as in layout 1, so that the hash over a run's content is still that of the run's beginning.
    """
    return f"{column}.ids", f"{column}.ends", f"{column}.edges"


def _joined(arrays: Iterator[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *(array.astype(np.int64) for array in arrays)])
