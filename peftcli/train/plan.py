"""Which examples each step sees: a function of the seed, the epoch and the step, and of nothing else."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from peftcli.schema import Training

_SORTED, _WINDOWS = 50, 4
"""With group_by_length: how many global batches at most are sorted by length together, and how often at least an epoch
is cut for it, or all epochs would have the same batches."""
_PACKED = 4096
"""With packing: how many examples, next to each other in the epoch's order, are packed together."""
_CLASSES = 32
"""With packing: length classes. More of them fill rows better; fewer make the packing of epochs differ more."""
_OFTEN = 4
"""A source of a mix that is seen more often than this over a run is worth a warning."""

MicroBatch = list[list[int]]
"""The rows of a micro-batch, each a list of example indices: one, or with packing several."""


class Plan:
    """The order of the examples over a run, and the rows that they are trained in."""

    def __init__(
        self,
        sizes: np.ndarray | Sequence[int],
        training: Training,
        num_processes: int,
        *,
        counts: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        max_length: int | None = None,
        divides: bool = True,
        groups: np.ndarray | None = None,
    ):
        """``counts`` and ``weights`` mix, ``max_length`` packs.

        Args:
            sizes: Of each training example, in the task's unit.
            training: how long, in which batches and in which order.
            num_processes: among how many the rows of a step are divided.
            counts: examples of each source; the sources' examples stand one after another.
            weights: how many examples of an epoch come from each source, relative to the others. None: all it has.
            max_length: Size of a packed row. None: every example has a row to itself.
            divides: As the task says: its loss does not compare the rows that are in the model at once.
            groups: The group of each training example; the rows of a step are of one. None: of any.
        """
        self.sizes = np.asarray(sizes, np.int64)
        self.training, self.num_processes, self.max_length = training, num_processes, max_length
        self.divides, self.groups = divides, groups
        self.counts = list(counts or [len(self.sizes)])
        self.draws = self.counts if weights is None else _shares(weights, len(self.sizes))
        """Examples of an epoch that come from each source."""
        self._is_weighted = weights is not None
        self._epoch_ends: list[int] = []  # with packing: steps until the end of each epoch that was built
        self._built: dict[int, _Epoch] = {}  # the epoch that was asked for last, and the one before

    @property
    def packs(self) -> bool:
        """Whether rows are packed."""
        return self.max_length is not None

    @property
    def global_batch_size(self) -> int:
        """Rows of one step, over all processes and micro-batches; with groups, a step may have fewer."""
        return self.rows_at_once * self.training.gradient_accumulation_steps

    @property
    def rows_at_once(self) -> int:
        """Rows that all processes have in the model at once."""
        return self.training.rows_at_once * self.num_processes

    @property
    def _is_joined(self) -> bool:
        """Whether a row of an epoch is several examples: a packed one, or with groups a whole step."""
        return self.packs or self.groups is not None

    @property
    def _rows_of_step(self) -> int:
        return self.global_batch_size if self.groups is None else 1

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch; the last may be smaller. With packing, other epochs may have a few more or less."""
        return self._steps_until(1)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        if self.training.max_steps > 0:
            return self.training.max_steps
        part, whole = math.modf(self.training.num_train_epochs)
        before = self._steps_until(int(whole))
        steps = before + (part * (self._steps_until(int(whole) + 1) - before) if part else 0)
        return max(1, math.ceil(round(steps, 6)))  # 2.2 * 25 is a little more than 55

    @property
    def passes(self) -> list[float]:
        """How often an epoch goes through each source: 1, unless there are weights."""
        return [draws / size if size else 0.0 for draws, size in zip(self.draws, self.counts, strict=True)]

    @property
    def epoch_examples(self) -> np.ndarray:
        """Indices of the examples of the first epoch, each as often as it is seen."""
        return self._epoch(0).members

    @property
    def efficiency(self) -> float:
        """The share of tokens, of those that the first epoch's padded rows hold, that are no padding.

        Where a model takes packed rows joined into one, nothing is padded at all.
        """
        if self.groups is not None:
            return 1.0
        rows = self._epoch(0).row_sizes(self.sizes)
        whole = len(rows) // self.global_batch_size * self.global_batch_size
        padded = self._padded(rows[:whole].reshape(-1, self.global_batch_size)) + self._padded(rows[None, whole:])
        return int(rows.sum()) / padded

    def repeated(self, names: Sequence[str]) -> list[str]:
        """A warning for each source, by its name, that its weight makes the run see very often."""
        epochs = self.epoch(self.total_steps)
        never = [
            f"{name} is never seen: its weight gives it none of the {len(self.sizes):,} examples of an epoch"
            for name, draws in zip(names, self.draws, strict=True)
            if not draws
        ]
        return never + [
            f"{name} is seen {passes * epochs:.1f} times over the run: its weight asks for {passes:.1f} times the "
            "examples that it has"
            for name, passes in zip(names, self.passes, strict=True)
            if passes > 1 and passes * epochs > _OFTEN
        ]

    def epoch(self, step: int) -> float:
        """Passes over the data after ``step`` steps."""
        if not self._is_joined:
            return step / self._steps_until(1)
        epoch, position = self._locate(step)
        if not position:
            return float(epoch)
        return epoch + position / (self._steps_until(epoch + 1) - self._steps_until(epoch))

    def ends_epoch(self, step: int) -> bool:
        """Whether the ``step``-th step, from 1, is the last of an epoch."""
        return self._locate(step)[1] == 0

    def global_batch(self, step: int) -> list[int]:
        """Indices of the examples of step ``step``, from 0."""
        return [index for row in self._rows(step) for index in row]

    def draw(self, step: int, index: int) -> int:
        """What the random numbers of an example are drawn by at a step: ``Example.draw``."""
        digest = hashlib.sha256(repr((self.training.seed, step, index)).encode()).digest()
        return int.from_bytes(digest[:7], "big") + 1

    def micro_batches(self, step: int, process: int) -> list[MicroBatch]:
        """The step's rows that ``process`` sees.

        Every process gets as many micro-batches as the others; where the last step of an epoch has too few rows for
        all, some are empty. Rows of like length stand together, which saves padding and, where the loss is a sum over
        the global batch, changes nothing else. Rows that are compared keep their order, and are as many as there are.
        """
        rows = self._rows(step)
        if self.divides:
            rows = sorted(rows, key=lambda row: int(self.sizes[row].sum()))
        parts, size = self._parts(len(rows))
        chunks = [rows[start : start + size] for start in range(0, size * parts, size)]
        mine = chunks[process :: self.num_processes]
        return mine if self.num_processes > 1 else [chunk for chunk in mine if chunk]

    def _parts(self, num_rows: int) -> tuple[int, int]:
        """Into how many parts a step's rows are divided, over all processes, and rows of a part at most."""
        micro_batches = self.training.gradient_accumulation_steps
        if not self.divides:
            micro_batches = min(micro_batches, math.ceil(num_rows / self.rows_at_once))
        parts = micro_batches * self.num_processes
        return parts, min(self.training.rows_at_once, math.ceil(num_rows / parts)) if parts else 0

    def _padded(self, steps: np.ndarray) -> int:
        """Tokens that the micro-batches of steps hold, padding included, from their rows' lengths (steps, rows)."""
        num_rows = steps.shape[1]
        starts = list(range(0, num_rows, max(1, self._parts(num_rows)[1])))
        if not starts:
            return 0
        ordered = np.sort(steps, axis=1) if self.divides else steps
        longest = np.maximum.reduceat(ordered, starts, axis=1).sum(axis=0)
        return int((longest * np.diff([*starts, num_rows])).sum())

    def _locate(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and how many steps of it come before."""
        if not self._is_joined:
            return divmod(step, self._steps_until(1))
        while step > (self._epoch_ends[-1] if self._epoch_ends else 0):
            self._steps_until(len(self._epoch_ends) + 1)
        epoch = bisect_right(self._epoch_ends, step)
        return epoch, step - self._steps_until(epoch)

    def _steps_until(self, epochs: int) -> int:
        """Steps of the first ``epochs`` epochs."""
        if not self._is_joined:
            return epochs * math.ceil(len(self.sizes) / self.global_batch_size)
        for epoch in range(len(self._epoch_ends), epochs):
            steps = math.ceil(len(self._epoch(epoch)) / self._rows_of_step)
            self._epoch_ends.append(steps + (self._epoch_ends[-1] if epoch else 0))
        return self._epoch_ends[epochs - 1] if epochs else 0

    def _rows(self, step: int) -> list[list[int]]:
        epoch, position = self._locate(step)
        start = position * self._rows_of_step
        rows = self._epoch(epoch).rows(start, start + self._rows_of_step)
        return rows if self.groups is None else [[index] for index in rows[0]]

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._built:
            before = {number - 1: self._built[number - 1]} if number - 1 in self._built else {}
            self._built = before | {number: self._build(number)}
        return self._built[number]

    def _build(self, number: int) -> _Epoch:
        strategy = self.training.train_sampling_strategy
        generator = torch.Generator().manual_seed(self.training.seed * 1_000_003 + number)
        order = self._drawn(number)
        if strategy != "sequential":
            order = order[_permutation(len(order), generator)]
        if self.groups is not None:
            epoch = _Epoch.of(chunks(order, self.groups, self.global_batch_size))
        else:
            epoch = _Epoch(order) if self.max_length is None else _packed(order, self.sizes, self.max_length)
        if strategy != "sequential" and self._is_joined:
            epoch = epoch.reordered(_permutation(len(epoch), generator))
        if strategy == "group_by_length" and self.groups is None:
            epoch = epoch.reordered(self._by_length(epoch.row_sizes(self.sizes), generator))
        return epoch

    def _drawn(self, number: int) -> np.ndarray:
        """The examples of an epoch: those of the sources one after another, or interleaved where none are shuffled."""
        if not self._is_weighted:
            return np.arange(len(self.sizes))
        starts = np.cumsum([0, *self.counts[:-1]])
        drawn = [start + self._drawn_from(source, number) for source, start in enumerate(starts)]
        joined = np.concatenate(drawn)
        if self.training.train_sampling_strategy != "sequential":
            return joined
        places = np.concatenate([(np.arange(len(part)) + 0.5) / max(len(part), 1) for part in drawn])
        return joined[np.argsort(places, kind="stable")]

    def _drawn_from(self, source: int, number: int) -> np.ndarray:
        """Positions in a source that an epoch sees: one permutation after another, from where the last epoch ended."""
        size, draws = self.counts[source], self.draws[source]
        places = np.arange(number * draws, (number + 1) * draws)
        if self.training.train_sampling_strategy == "sequential" or not draws:
            return places % size if draws else places
        first, last, seed = places[0] // size, places[-1] // size, self.training.seed
        orders = list[np.ndarray]()
        for turn in range(int(first), int(last) + 1):
            digest = hashlib.sha256(repr((seed, source, turn)).encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            orders.append(_permutation(size, generator))
        return np.concatenate(orders)[places - first * size]

    def _by_length(self, lengths: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """An order of rows in which those of a global batch are of like length, and the batches shuffled."""
        size = self.global_batch_size
        window = size * min(_SORTED, max(1, len(lengths) // size // _WINDOWS))
        starts = range(0, len(lengths), window)
        order = np.concatenate([start + np.argsort(lengths[start : start + window], kind="stable") for start in starts])
        whole = len(order) // size * size
        batches = order[:whole].reshape(-1, size)[_permutation(whole // size, generator)]
        return np.concatenate([batches.ravel(), order[whole:]])


@dataclass(frozen=True)
class _Epoch:
    """The rows of one epoch, one after another."""

    members: np.ndarray
    """Example indices, row by row."""
    bounds: np.ndarray | None = None
    """Where in ``members`` each row begins, and where the last one ends. None: every row is one example."""

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> _Epoch:
        """Return the epoch of rows of several examples each."""
        return cls(np.concatenate(rows), np.cumsum([0, *map(len, rows)]))

    def __len__(self) -> int:
        return len(self.members) if self.bounds is None else len(self.bounds) - 1

    def row_sizes(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens of each row."""
        taken = lengths[self.members]
        return taken if self.bounds is None else np.add.reduceat(taken, self.bounds[:-1])

    def rows(self, start: int, stop: int) -> list[list[int]]:
        """The examples of some rows."""
        if self.bounds is None:
            return [[index] for index in self.members[start:stop].tolist()]
        bounds = self.bounds[start : stop + 1].tolist()
        return [self.members[begin:end].tolist() for begin, end in pairwise(bounds)]

    def reordered(self, order: np.ndarray) -> _Epoch:
        """The same rows in another order."""
        if self.bounds is None:
            return _Epoch(self.members[order])
        sizes = np.diff(self.bounds)[order]
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        shift = np.repeat(self.bounds[:-1][order] - bounds[:-1], sizes)
        return _Epoch(self.members[np.arange(len(self.members)) + shift], bounds)


def chunks(order: np.ndarray, groups: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut an order of examples into chunks of one group each, of at most ``size`` examples.

    Chunks stand in the order of their first examples.
    """
    found = list[np.ndarray]()
    for group in np.unique(groups[order]):
        places = np.flatnonzero(groups[order] == group)
        found += [places[start : start + size] for start in range(0, len(places), size)]
    return [order[places] for places in sorted(found, key=lambda places: int(places[0]))]


def _packed(order: np.ndarray, lengths: np.ndarray, max_length: int) -> _Epoch:
    """The examples in rows, a window at a time; rows stand in the order of their first examples."""
    members, sizes = [], [np.zeros(1, np.int64)]
    for start in range(0, len(order), _PACKED):
        window = order[start : start + _PACKED]
        _, first, row = np.unique(best_fit(lengths[window], max_length), return_index=True, return_inverse=True)
        place = np.argsort(np.argsort(first))[row]
        members.append(window[np.argsort(place, kind="stable")])
        sizes.append(np.bincount(place))
    return _Epoch(np.concatenate(members), np.cumsum(np.concatenate(sizes)))


def best_fit(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """Assign each example to a row of at most ``max_length`` tokens; return the row's number, from 0.

    Best fit, longest first: each example goes into the fullest row that has room for it. Examples of about the same
    length keep the given order, so another order packs other examples together. An example longer than ``max_length``
    gets its own row.
    """
    order = np.argsort(-(lengths // max(1, max_length // _CLASSES)), kind="stable")
    rows: list[int] = []
    free: dict[int, list[int]] = {}  # room -> the rows that have so much left
    rooms: list[int] = []  # the keys of free, sorted
    num_rows = 0
    for length in lengths[order].tolist():
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            rows.append(free[room].pop())
            if not free[room]:
                del free[room], rooms[at]
        else:
            room = max(max_length, length)
            rows.append(num_rows)
            num_rows += 1
        left = room - length
        if left in free:
            free[left].append(rows[-1])
        elif left:
            free[left] = [rows[-1]]
            insort(rooms, left)
    return np.array(rows)[np.argsort(order)]


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """``total`` divided in proportion to the weights, in whole numbers; the largest remainders are rounded up."""
    exact = np.array(weights, float) / sum(weights) * total
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: total - shares.sum()]] += 1
    return [int(share) for share in shares]


def _permutation(size: int, generator: torch.Generator) -> np.ndarray:
    return torch.randperm(size, generator=generator).numpy()
