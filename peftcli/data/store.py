"""The features of one dataset on disk, read through memory maps, and a record of what became of each row.

A store is a folder: ``store.json`` describes it, the other files are plain arrays. ``MANIFEST.json``, written last, has
the size and checksum of each, so that a flipped bit is found when the store is opened. A dataset larger than memory
fits, since only the pages that are read are held, and not for long.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import operator
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, overload

import numpy as np

from peftcli.data.rows import Place
from peftcli.errors import DataError, StorageError

Feature = dict[str, list[int]]
"""One example as the model takes it: ``input_ids``, ``labels`` and what else a task reads, each a list of ids."""

FORMAT = 1
"""Changes with the layout below."""
MANIFEST, DESCRIPTION = "MANIFEST.json", "store.json"
_BAD_ROWS = "bad.jsonl"
USED, BAD = "used", "cannot be used"
"""What became of a row that has features; of one that its reader or encoder refused."""

_ROW = np.dtype(
    [
        ("number", "<i8"),
        ("line", "<i8"),  # 0: none
        ("file", "<i4"),  # index into the description's files
        ("outcome", "<i4"),  # index into the description's outcomes
        ("flags", "<i4"),
        ("tokens", "<i4"),  # before any cut
        ("lost", "<i4"),  # targets that a cut took away
    ]
)
_FEATURE = np.dtype([("row", "<i8"), ("targets", "<i4")])
_BLOCK = 1 << 20
"""Bytes that are checked at once."""
_HELD, _AROUND = 64 << 20, 1 << 20
"""Bytes of the maps that are read before their pages are given back to the system, which keeps them while it has room;
bytes that it may map around those of one read."""


@dataclass(slots=True)
class Outcome:
    """What an encoder made of one row."""

    features: list[Feature] = field(default_factory=list)
    """None where the row is left out; several where it was split."""
    targets: list[int] = field(default_factory=list)
    """Targets of each feature."""
    reason: str = USED
    """Why the row is left out, or ``used``."""
    tokens: int = 0
    """Length of the row in tokens, before any cut."""
    lost: int = 0
    """Targets that a cut took away."""
    flags: int = 0
    """``peftcli.tasks.text.flags.Flag`` as a number."""


class Writer:
    """Writes a store into an empty folder, a batch of rows at a time.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """

    def __init__(self, folder: Path, columns: Sequence[str]):
        self.folder, self.columns = folder, tuple(columns)
        self.outcomes, self.files = {USED: 0, BAD: 1}, dict[str, int]()
        self.num_rows = self.num_features = 0
        self._ends = dict.fromkeys(self.columns, 0)
        arrays = ["rows", "features", *(f"{name}.{kind}" for name in self.columns for kind in ("ids", "ends"))]
        with writing(folder):
            self._open = {name: _File(folder / name) for name in (*map(_file, arrays), _BAD_ROWS)}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_error: object) -> None:
        for file in self._open.values():
            file.close()

    def add(self, places: Sequence[Place], results: Sequence[Outcome | DataError]) -> None:
        """The next rows, and what became of each."""
        rows = np.zeros(len(places), _ROW)
        features: list[Feature] = []
        records: list[tuple[int, int]] = []
        bad: list[str] = []
        for index, (place, result) in enumerate(zip(places, results, strict=True)):
            file = self.files.setdefault(place.source, len(self.files))
            if isinstance(result, DataError):
                bad.append(json.dumps({"row": self.num_rows + index, **result.as_dict()}) + "\n")
                rows[index] = (place.number, place.line or 0, file, self.outcomes[BAD], 0, 0, 0)
                continue
            outcome = self.outcomes.setdefault(result.reason, len(self.outcomes))
            rows[index] = (
                place.number, place.line or 0, file, outcome, result.flags, result.tokens, result.lost
            )  # fmt: skip
            for feature, targets in zip(result.features, result.targets, strict=True):
                assert feature.keys() == self._ends.keys()
                features.append(feature)
                records.append((self.num_rows + index, targets))
        with writing(self.folder):
            self._write("rows", rows)
            self._write("features", np.array(records, _FEATURE))
            self._open[_BAD_ROWS].write("".join(bad).encode())
            for name in self.columns:
                sizes = [len(feature[name]) for feature in features]
                ids = np.fromiter(chain.from_iterable(feature[name] for feature in features), "<i4", sum(sizes))
                self._write(f"{name}.ids", ids)
                self._write(f"{name}.ends", np.cumsum(sizes, dtype="<i8") + self._ends[name])
                self._ends[name] += len(ids)
        self.num_rows, self.num_features = self.num_rows + len(places), self.num_features + len(features)

    def finish(self, **about: Any) -> None:
        """The description and the manifest, last: a folder without them is no store. ``about`` is kept as it is."""
        described = {
            "format": FORMAT,
            "columns": self.columns,
            "rows": self.num_rows,
            "features": self.num_features,
            "ids": self._ends,
            "outcomes": list(self.outcomes),
            "files": list(self.files),
            "about": about,
        }
        with writing(self.folder):
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


class Store(Sequence[Feature]):
    """A store that was written, as a sequence of features.

    Raises:
        ValueError: the folder holds no whole store of this layout, or one whose bytes have changed.
    """

    def __init__(self, folder: Path, *, verify: bool = True):
        self.folder = folder
        described = describe(folder, verify=verify)
        self.columns: tuple[str, ...] = tuple(described["columns"])
        self.outcomes: list[str] = described["outcomes"]
        self.files: list[str] = described["files"]
        self.about: dict[str, Any] = described["about"]
        self._maps: list[mmap.mmap] = []
        self._read = 0
        self.rows = self._mapped("rows", _ROW)
        """A record a row: number, line, file, outcome, flags, tokens, lost."""
        self._features = self._mapped("features", _FEATURE)
        self._ids = {name: self._mapped(f"{name}.ids", np.dtype("<i4")) for name in self.columns}
        self._ends = {name: self._mapped(f"{name}.ends", np.dtype("<i8")) for name in self.columns}

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the same files; what this one has verified is not read again."""
        return _reopened, (self.folder,)

    def __len__(self) -> int:
        return len(self._features)

    @overload
    def __getitem__(self, index: int) -> Feature: ...
    @overload
    def __getitem__(self, index: slice) -> list[Feature]: ...
    def __getitem__(self, index: int | slice) -> Feature | list[Feature]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        return {name: self.ids(name, index).tolist() for name in self.columns}

    def ids(self, column: str, index: int) -> np.ndarray:
        """One column of one feature, without a copy."""
        ends = self._ends[column]
        at = _position(index, len(ends))
        found: np.ndarray = self._ids[column][ends[at - 1] if at else 0 : ends[at]]
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
    def lengths(self) -> np.ndarray:
        """Tokens of each feature's input."""
        return np.diff(self._ends["input_ids"], prepend=0)

    @property
    def targets(self) -> np.ndarray:
        """Targets of each feature."""
        return np.asarray(self._features["targets"])

    @property
    def row_of(self) -> np.ndarray:
        """The row, counted from 0, that each feature came from."""
        return np.asarray(self._features["row"])

    @property
    def content(self) -> str:
        """A hash over what the features hold: two stores with the same are trained alike."""
        listed = json.loads((self.folder / MANIFEST).read_bytes())["files"]
        held = {name: said for name, said in listed.items() if name.endswith((".ids.bin", ".ends.bin", "features.bin"))}
        return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()

    def place(self, row: int) -> Place:
        """Where a row, counted from 0, stands."""
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
class Part:
    """Some rows of a store."""

    store: Store
    chosen: np.ndarray | None = None
    """Their positions, counted from 0, in order; None: all."""

    @property
    def records(self) -> np.ndarray:
        """The records of the rows."""
        return self.store.rows if self.chosen is None else self.store.rows[self.chosen]

    @property
    def mask(self) -> np.ndarray:
        """Which rows of the store they are."""
        mask = np.ones(len(self.store.rows), bool)
        if self.chosen is not None:
            mask[:] = False
            mask[self.chosen] = True
        return mask

    @property
    def features(self) -> np.ndarray:
        """Positions of their features in the store."""
        if self.chosen is None:
            return np.arange(len(self.store))
        return np.flatnonzero(self.mask[self.store.row_of])

    def bad_rows(self) -> Iterator[tuple[int, DataError]]:
        """Those of the rows that cannot be used, by their positions in the store."""
        mask = self.mask
        return ((row, error) for row, error in self.store.bad_rows() if mask[row])


class View(Sequence[Feature]):
    """The features of some rows of some stores, one after another."""

    def __init__(self, parts: Sequence[Part]):
        """Reads the sizes, not the features."""
        self.parts = list(parts)
        self._chosen = [part.features for part in self.parts]
        self._starts = list(accumulate(map(len, self._chosen), initial=0))
        pairs = list(zip(self.parts, self._chosen, strict=True))
        self.lengths = _joined(part.store.lengths[chosen] for part, chosen in pairs)
        """Tokens of each feature's input."""
        self.targets = _joined(part.store.targets[chosen] for part, chosen in pairs)
        """Targets of each feature."""

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def sizes(self) -> list[int]:
        """Features of each part."""
        return [len(chosen) for chosen in self._chosen]

    @overload
    def __getitem__(self, index: int) -> Feature: ...
    @overload
    def __getitem__(self, index: slice) -> list[Feature]: ...
    def __getitem__(self, index: int | slice) -> Feature | list[Feature]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        store, position = self.locate(index)
        return store[position]

    def locate(self, index: int) -> tuple[Store, int]:
        """The store of a feature, and its position there."""
        at = _position(index, len(self))
        part = bisect_right(self._starts, at) - 1
        return self.parts[part].store, int(self._chosen[part][at - self._starts[part]])


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, an OSError is about writing ``path``.

    Raises:
        StorageError: in its place.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror or error}", file=str(path)) from None


def describe(folder: Path, *, verify: bool) -> dict[str, Any]:
    """What ``Writer.finish`` wrote of a store, once its files have the sizes that they should have.

    Args:
        folder: Holds the store.
        verify: Whether the files are read too, and compared with their checksums.

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


def _reopened(folder: Path) -> Store:
    return Store(folder, verify=False)


def _file(name: str) -> str:
    return f"{name}.bin"


def _position(index: int, count: int) -> int:
    """An index, which may count from the end, as one from the beginning."""
    at = operator.index(index)
    if not -count <= at < count:
        raise IndexError(index)
    return at % count


def _joined(arrays: Iterator[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *(array.astype(np.int64) for array in arrays)])
