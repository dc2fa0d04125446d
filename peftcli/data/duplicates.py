"""Rows that repeat other rows, exactly or nearly, found from hashes in memory that does not grow with their length.

Exact: the same values (token ids). Compared are hashes of 64 bits, so that among 100,000 rows one pair is taken for
equal wrongly with a probability of 3e-10.

Near: the sets of their shingles (runs of three tokens) overlap to at least 0.7 (Jaccard index: shared / all). Shingles
that stand in more than 5 % of the rows, as a shared prompt's, are left out on both sides, and so are rows with less
than 8 shingles after that. Of a text that makes up more than 5 % of the rows, edited copies are therefore not seen.

Candidates come from MinHash signatures (Broder 1997) of 63 values in 21 bands of 3: a pair of index s shares a band
with probability 1 - (1 - s^3)^21: 0.75 at 0.4, 0.94 at 0.5, 0.9998 at 0.7. Each row is compared with the first and the
nearest earlier row of each of its bands, and the candidate whose signature is most alike is then measured exactly. So a
pair that is reported is one, and a few that are hardly alike enough are missed: the test of this file counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from peftcli.data.used_rows import Ragged, UsedRows, repeats, scatter, slices

ALIKE = 0.7
"""Rows are near duplicates from this Jaccard index on."""
MOST_ROWS = 500_000
"""Of more rows, an even sample of this size is compared: each takes 128 bytes."""

_SHINGLE = 3
_COMMON = 0.05
_FEWEST = 8
_HASHES, _BAND = 63, 3
SAMPLE = 2000
"""Number of rows that show which shingles are common."""
_PAIRS = 1 << 16
"""Pairs of signatures compared at once."""
_TABLE = 22
"""Number of bits of a hash that identify common shingles: one in a thousand others passes for common."""
_MULTIPLIERS = np.random.default_rng(20240229).integers(0, 1 << 32, _HASHES, dtype=np.uint32) | np.uint32(1)


@dataclass(frozen=True)
class Pairs:
    """Rows that nearly repeat an earlier one."""

    later: np.ndarray
    earlier: np.ndarray
    index: np.ndarray
    """The Jaccard index of each pair."""
    compared: int
    """Number of compared rows: those with enough shingles."""


@dataclass
class Sketches:
    """Signatures of rows, added chunk by chunk."""

    common: np.ndarray
    """A mask of the common shingles, by ``_TABLE`` bits of their hash."""
    every: int = 1
    """One in this number of rows is compared."""
    _numbers: list[np.ndarray] = field(default_factory=list)
    _signatures: list[np.ndarray] = field(default_factory=list)

    def add(self, first: int, rows: Ragged) -> None:
        """Add the next rows; ``first`` is the number of the first of them."""
        numbers = np.arange(first, first + len(rows.starts))
        if self.every > 1:
            looked_at = numbers % self.every == 0
            numbers, rows = numbers[looked_at], rows.pick(looked_at)
        shingles, owners = self._distinctive(rows)
        enough = np.bincount(owners, minlength=len(numbers)) >= _FEWEST
        shingles, owners = shingles[enough[owners]], owners[enough[owners]]
        signatures = np.zeros((int(enough.sum()), _HASHES), np.uint16)
        if len(shingles):
            starts = np.flatnonzero(np.diff(owners, prepend=-1))
            for index, multiplier in enumerate(_MULTIPLIERS):
                signatures[:, index] = np.minimum.reduceat(shingles * multiplier, starts)
        self._numbers.append(numbers[enough])
        self._signatures.append(signatures)

    def pairs(
        self, read: Callable[[np.ndarray], Ragged], tokens: np.ndarray, among: np.ndarray, least: float = ALIKE
    ) -> Pairs:
        """Find the near duplicates among the rows.

        ``read`` returns rows by their numbers, ``tokens`` are their lengths, ``among`` is a mask of those to compare,
        and ``least`` is the Jaccard index from which they are near duplicates.
        """
        kept = [among[numbers] for numbers in self._numbers]
        numbers = np.concatenate([np.zeros(0, int), *(a[mask] for a, mask in zip(self._numbers, kept, strict=True))])
        signatures = np.concatenate(
            [np.zeros((0, _HASHES), np.uint16), *(a[mask] for a, mask in zip(self._signatures, kept, strict=True))]
        )
        partners, alike = _partners(signatures)
        # Three standard deviations of the estimate below the threshold.
        likely = np.flatnonzero(alike >= least - 3 * (least * (1 - least) / _HASHES) ** 0.5)
        later, earlier = numbers[likely], numbers[partners[likely]]
        index = np.zeros(len(later))
        for some in slices(tokens[later] + tokens[earlier]):
            index[some] = self._overlaps(read(later[some]), read(earlier[some]))
        near = index >= least
        return Pairs(later[near], earlier[near], index[near], compared=len(numbers))

    def _overlaps(self, later: Ragged, earlier: Ragged) -> np.ndarray:
        """The Jaccard index of each row of the one with that of the other."""
        one, other = (np.unique(_keyed(*self._distinctive(rows))) for rows in (later, earlier))
        both = np.intersect1d(one, other, assume_unique=True)
        a, b, shared = (
            np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(later.starts))
            for keys in (one, other, both)
        )
        return shared / (a + b - shared)

    def _distinctive(self, rows: Ragged) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of the shingles that are not common, and their rows."""
        shingles, owners = _shingles(rows)
        kept = ~self.common[shingles >> np.uint32(32 - _TABLE)]
        return shingles[kept], owners[kept]


def find_duplicates(rows: UsedRows, columns: Sequence[str], *, least: float = ALIKE) -> tuple[np.ndarray, Pairs]:
    """Hashes of the values of the rows in these columns, and the pairs of rows that are nearly equal.

    Only sequences of numbers can be nearly equal: from the Jaccard index ``least`` on.
    """
    hashes, lengths = np.zeros(len(rows), np.uint64), rows.lengths(*columns)
    sequences = all(part.store.columns[name].dtype.startswith("int") for part in rows.view.parts for name in columns)
    sample = spread(len(rows), SAMPLE if sequences else 0)
    common = common_shingles(rows.read(sample[some], *columns) for some in slices(lengths[sample]))
    sketches = Sketches(common, every=max(1, -(-len(rows) // MOST_ROWS)))
    for some in slices(lengths):
        chunk = rows.read(np.arange(some.start, some.stop), *columns)
        hashes[some] = chunk.hashes()
        if sequences:
            sketches.add(some.start, chunk)
    return hashes, sketches.pairs(lambda some: rows.read(some, *columns), lengths, ~repeats(hashes), least)


def most_shared(count: int) -> float:
    """The most of ``count`` rows that may share something which still says that they belong together.

    That is 5 % of them. In a sample so small that 5 % are fewer than ten rows, it is ten, or half of the rows.
    """
    return max(2, _COMMON * count, min(10, count / 2))


def common_shingles(sample: Iterable[Ragged]) -> np.ndarray:
    """A mask of the common shingles, for Sketches. Rows that repeat another one count once."""
    found: list[np.ndarray] = []
    seen: set[int] = set()
    count = 0
    for chunk in sample:
        hashes = chunk.hashes()
        rows = chunk.pick(~repeats(hashes) & [each not in seen for each in hashes.tolist()])
        seen.update(hashes.tolist())
        shingles, owners = _shingles(rows)
        found.append(np.unique(_keyed(shingles, owners)).astype(np.uint32))
        count += len(rows.starts)
    values, times = np.unique(np.concatenate([np.zeros(0, np.uint32), *found]), return_counts=True)
    table = np.zeros(1 << _TABLE, bool)
    table[values[times > most_shared(count)] >> np.uint32(32 - _TABLE)] = True
    return table


def spread(count: int, most: int) -> np.ndarray:
    """At most ``most`` of the numbers below ``count``, evenly: the first, the last, and others between."""
    if most >= count:
        return np.arange(count)
    return np.linspace(0, count - 1, most).round().astype(int) if most > 1 else np.arange(most)


def _shingles(rows: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """A hash of 32 bits for each run of three tokens in a row, and the row."""
    owners = rows.owners()
    if len(owners) < _SHINGLE:
        return np.zeros(0, np.uint32), np.zeros(0, int)
    tokens = scatter(rows.values.astype(np.uint64))
    mixed = tokens[:-2] * np.uint64(3) + tokens[1:-1] * np.uint64(5) + tokens[2:] * np.uint64(7)
    inside = owners[:-2] == owners[2:]
    return (scatter(mixed[inside]) >> np.uint64(32)).astype(np.uint32), owners[:-2][inside]


def _keyed(shingles: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Row and shingle as one number."""
    return (owners.astype(np.uint64) << np.uint64(32)) | shingles


def _partners(signatures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row, the earlier candidate with the most similar signature, and the share of equal values."""
    partner, alike = np.zeros(len(signatures), int), np.zeros(len(signatures), np.float32)
    for band in range(0, _HASHES, _BAND):
        one, other, third = signatures[:, band : band + _BAND].astype(np.uint64).T
        keys = one | (other << np.uint64(16)) | (third << np.uint64(32))
        order = np.argsort(keys, kind="stable")
        again = np.flatnonzero(keys[order[1:]] == keys[order[:-1]]) + 1
        begins = np.arange(len(order))
        begins[again] = 0
        first = np.maximum.accumulate(begins)
        for candidates in (first[again], again - 1):
            for start in range(0, len(again), _PAIRS):
                later, earlier = order[again[start : start + _PAIRS]], order[candidates[start : start + _PAIRS]]
                share = (signatures[later] == signatures[earlier]).mean(axis=1, dtype=np.float32)
                better = share > alike[later]
                partner[later[better]], alike[later[better]] = earlier[better], share[better]
    return partner, alike
