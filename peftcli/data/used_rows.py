"""The used rows of a view, and the arrays of their examples, read a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from peftcli.data.findings import Finding, Kind
from peftcli.data.rows import Place
from peftcli.data.store import View

_CHUNK = 1 << 18
"""Values that are read together."""


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, one after another."""

    values: np.ndarray
    """Integers."""
    starts: np.ndarray
    """The start of each row. No row is empty."""

    @property
    def lengths(self) -> np.ndarray:
        """Values of each row."""
        return np.diff(self.starts, append=len(self.values))

    def owners(self) -> np.ndarray:
        """The row of each value."""
        return np.repeat(np.arange(len(self.starts)), self.lengths)

    def pick(self, rows: np.ndarray) -> Ragged:
        """The rows in a mask."""
        lengths = self.lengths[rows]
        return Ragged(self.values[rows[self.owners()]], np.cumsum(lengths) - lengths)

    def hashes(self) -> np.ndarray:
        """A hash of 64 bits for each row; rows of the same values have the same one."""
        positions = np.arange(len(self.values)) - np.repeat(self.starts, self.lengths)
        low = self.values.astype(np.uint32).astype(np.uint64)
        mixed = scatter((positions.astype(np.uint64) << np.uint64(32)) + low)
        return scatter(np.add.reduceat(mixed, self.starts) if len(self.starts) else mixed)


class UsedRows:
    """The rows that have examples, in order."""

    def __init__(self, view: View):
        self.view = view
        parts, numbers, firsts = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
        before = 0
        positions = [part.examples for part in view.parts]
        for at, count in enumerate(view.counts):
            rows = view.parts[at].store.row_of[positions[at]]
            first = np.flatnonzero(np.diff(rows, prepend=-1))
            parts.append(np.full(len(first), at))
            numbers.append(rows[first])
            firsts.append(first + before)
            before += count
        nothing = np.zeros(0, np.int64)
        self.part, self.number = np.concatenate([nothing, *parts]), np.concatenate([nothing, *numbers])
        """Part of the view, and position in the part's store, of each row."""
        self.first = np.concatenate([nothing, *firsts, [before]])
        """Each row's first example; at the end, the number of examples."""
        self._position = np.concatenate([nothing, *positions])

    def __len__(self) -> int:
        return len(self.part)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """A value of each example, summed over the examples of each row."""
        ends = np.concatenate([[0], np.cumsum(values)])
        return ends[self.first[1:]] - ends[self.first[:-1]]

    def records(self, name: str) -> np.ndarray:
        """A field of the records of the rows: ``flags``, ``lost``, ``size``, ``group``, ``shared``."""
        out = np.zeros(len(self), np.uint64 if name in ("group", "shared") else np.int64)
        for at, part in enumerate(self.view.parts):
            mine = self.part == at
            out[mine] = part.store.rows[name][self.number[mine]]
        return out

    def place(self, row: int) -> Place:
        """The place of a row."""
        return self.view.parts[self.part[row]].store.place(int(self.number[row]))

    def findings(self, masks: Iterable[tuple[Kind, np.ndarray]], *, split: str = "train") -> list[Finding]:
        """The findings about the rows in the masks; none of a kind whose mask is empty."""
        return [
            kind.finding(int(mask.sum()), len(self), map(self.place, np.flatnonzero(mask).tolist()), split=split)
            for kind, mask in masks
            if mask.any()
        ]

    def lengths(self, *columns: str) -> np.ndarray:
        """Values that each row has in these columns."""
        out = np.zeros(len(self.view), np.int64)
        for at, part in enumerate(self.view.parts):
            mine = np.repeat(self.part == at, np.diff(self.first))
            for name in columns:
                out[mine] += part.store.lengths(name)[self._position[mine]]
        return self.sums(out)

    def read(self, rows: np.ndarray, *columns: str) -> Ragged:
        """The values of some rows: of each example these columns, one after another."""
        counts = self.first[rows + 1] - self.first[rows]
        starts = np.cumsum(counts) - counts
        inside = np.arange(counts.sum()) - np.repeat(starts, counts)
        positions = self._position[np.repeat(self.first[rows], counts) + inside]
        parts = np.repeat(self.part[rows], counts)
        # Adjacent examples are read together where no column comes between them.
        apart = (np.diff(positions) != 1) | (np.diff(parts) != 0) | (len(columns) > 1)
        arrays, lengths = list[np.ndarray](), [np.zeros(1, np.int64)]
        for start, stop in pairwise([0, *(np.flatnonzero(apart) + 1).tolist(), len(positions)]):
            store, position = self.view.parts[parts[start]].store, int(positions[start])
            for name in columns:
                values, own = store.values(name, position, position + stop - start)
                arrays.append(_integers(values))
                lengths.append(own * (len(arrays[-1]) // max(len(values), 1)))
        return Ragged(np.concatenate(arrays), np.cumsum(np.concatenate(lengths))[starts * len(columns)])

    def hashes(self, *columns: str) -> np.ndarray:
        """A hash of each row's values in these columns; 0 where it has none."""
        out, lengths = np.zeros(len(self), np.uint64), self.lengths(*columns)
        some = np.flatnonzero(lengths)
        for each in slices(lengths[some]):
            out[some[each]] = self.read(some[each], *columns).hashes()
        return out

    def chunks(self, *columns: str) -> Iterator[tuple[slice, list[Ragged]]]:
        """All rows, a few at a time, and their values in each of the columns."""
        for some in slices(self.lengths(*columns)):
            rows = np.arange(some.start, some.stop)
            yield some, [self.read(rows, name) for name in columns]


def slices(lengths: np.ndarray) -> Iterator[slice]:
    """All rows, a few at a time: about ``_CHUNK`` values, and at least one row."""
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + _CHUNK, side="right")))
        yield slice(start, end)
        start = end


def repeats(hashes: np.ndarray) -> np.ndarray:
    """A mask of the hashes that an earlier one is equal to."""
    again = np.ones(len(hashes), bool)
    again[np.unique(hashes, return_index=True)[1]] = False
    return again


def scatter(numbers: np.ndarray) -> np.ndarray:
    """Scatter each number of 64 bits over all of them (splitmix64)."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _integers(values: np.ndarray) -> np.ndarray:
    """Elements of a column as integers; other numbers, such as NaN, by their bytes."""
    return values if values.dtype.kind in "biu" else np.frombuffer(values.tobytes(), np.uint8)
