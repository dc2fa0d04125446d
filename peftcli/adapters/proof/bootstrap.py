"""Paired bootstrap: how far the difference of two models' metrics would be off on other rows of the same kind.

Rows are drawn with replacement, the same ones for both models, and the metrics of each draw are computed from the sums
of their parts (Efron and Tibshirani 1993, An Introduction to the Bootstrap).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from peftcli.tasks.parts import Parts

DRAWS = 10_000
_LEVEL = 0.95
_CHUNK = 2_000_000
"""Rows that are drawn together."""
_FEWEST = 200
"""Draws below which there is no interval."""
MeasureRows = Callable[[np.ndarray], tuple[Mapping[str, float], Mapping[str, float]]]
"""From the numbers of rows, repeats among them: the metrics of both models."""


@dataclass(frozen=True)
class Interval:
    """A metric of two models on the same rows."""

    base: float
    other: float
    low: float
    """Where the interval of the difference, other less base, begins."""
    high: float
    draws: int

    @property
    def difference(self) -> float:
        """Other less base."""
        return self.other - self.base

    def verdict(self, *, lower_is_better: bool) -> str:
        """Return whether the other is ``better``, ``worse``, or there is ``no_difference`` beyond chance."""
        if self.low <= 0 <= self.high:
            return "no_difference"
        return "better" if (self.high < 0) == lower_is_better else "worse"


def paired_intervals(
    base: Parts, other: Parts, units: np.ndarray | None = None, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Interval]:
    """Return the 95 % interval of the difference of each metric that both models have.

    ``units`` is the unit of each row (N,), from 0: rows of one unit belong together, and are drawn together.
    """
    values = [_sums_of_units(each.values, units) for each in (base, other)]
    count = len(values[0])
    random, found, size = np.random.default_rng(seed), list[list[dict[str, np.ndarray]]](), max(1, _CHUNK // count)
    for start in range(0, draws, size):
        counts = draw_counts(random, count, min(size, draws - start))
        found.append([each.metrics_of(counts @ own) for each, own in zip((base, other), values, strict=True)])
    whole = [each.metrics_of(own.sum(axis=0, keepdims=True)) for each, own in zip((base, other), values, strict=True)]
    names = [name for name in whole[0] if name in whole[1]]
    drawn = {name: [np.concatenate([_values(each[at], name) for each in found]) for at in (0, 1)] for name in names}
    without = [each.metrics_of(own.sum(axis=0) - own) for each, own in zip((base, other), values, strict=True)]
    intervals = dict[str, Interval | None]()
    for name in names:
        one, two = (float(each[name][0]) for each in whole)
        left = _values(without[1], name) - _values(without[0], name)
        intervals[name] = interval_of(one, two, drawn[name][0], drawn[name][1], left)
    return {name: each for name, each in intervals.items() if each is not None}


def measured_intervals(
    measure: MeasureRows, units: np.ndarray, names: Sequence[str], seconds: float, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Interval]:
    """Return the same for metrics that no sums give, from as many draws as ``seconds`` allow.

    ``measure`` computes them of drawn rows.
    """
    order, random, end = np.argsort(units, kind="stable"), np.random.default_rng(seed), time.perf_counter() + seconds
    members = np.split(order, np.flatnonzero(np.diff(units[order])) + 1)
    whole, found = measure(np.arange(len(units))), list[tuple[Mapping[str, float], Mapping[str, float]]]()
    while len(found) < draws and (time.perf_counter() < end or len(found) < _FEWEST):
        found.append(measure(np.concatenate([members[at] for at in random.integers(len(members), size=len(members))])))
    intervals = dict[str, Interval]()
    for name in names:
        drawn = [np.array([each[at].get(name, np.nan) for each in found]) for at in (0, 1)]
        both = [each.get(name, np.nan) for each in whole]
        if (interval := interval_of(both[0], both[1], drawn[0], drawn[1])) is not None:
            intervals[name] = interval
    return intervals


def interval_of(
    base: float, other: float, of_base: np.ndarray, of_other: np.ndarray, without: np.ndarray | None = None
) -> Interval | None:
    """Return the interval of a metric's difference, from its draws; None where that is not defined.

    ``without`` is the difference without each unit in turn (U,): the ends are then corrected for bias and skewness
    (BCa: Efron 1987, Better Bootstrap Confidence Intervals), and for the number of units; else they are percentiles.
    """
    differences = of_other - of_base
    differences = differences[np.isfinite(differences)]
    if not (np.isfinite(base) and np.isfinite(other)) or len(differences) < _FEWEST:
        return None
    normal = NormalDist()
    below = np.mean(differences < other - base) + np.mean(differences == other - base) / 2
    ends = [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2]
    if without is not None and np.isfinite(without).all() and 0 < below < 1 and np.ptp(without) > 0:
        count, far = len(without), without.mean() - without
        skew = float((far**3).sum() / (6 * (far**2).sum() ** 1.5))
        bias = normal.inv_cdf(float(below))
        for at, end in enumerate(ends):
            z = normal.inv_cdf(end)
            z = (z + (z**3 + z) / (4 * count)) * math.sqrt(count / (count - 1)) + bias  # Student's, by its first terms
            ends[at] = normal.cdf(bias + z / (1 - skew * z))
    low, high = np.quantile(differences, sorted(ends))
    return Interval(base, other, float(low), float(high), len(differences))


def draw_counts(random: np.random.Generator, count: int, draws: int) -> np.ndarray:
    """Draw ``count`` units with replacement, ``draws`` times. Returns how often each was drawn: (D, U), float64."""
    drawn = random.integers(count, size=(draws, count)) + np.arange(draws)[:, None] * count
    return np.bincount(drawn.ravel(), minlength=draws * count).reshape(draws, count).astype(np.float64)


def _sums_of_units(values: np.ndarray, units: np.ndarray | None) -> np.ndarray:
    if units is None:
        return values
    sums = np.zeros((int(units.max()) + 1, values.shape[1]))
    np.add.at(sums, units, values)
    return sums


def _values(found: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The draws of a metric; NaN where none of them has it."""
    return found.get(name, np.full(len(next(iter(found.values()))), np.nan))
