"""The interval of a difference of two models' metrics."""

from __future__ import annotations

import numpy as np
import pytest

from peftcli.adapters.proof.bootstrap import Interval, paired_intervals
from peftcli.tasks.parts import means

ZEROS, ONES = np.zeros(400), np.ones(400)
CHANGES = np.random.default_rng(1).normal(0.3, 1.0, 400)


def interval(changes: np.ndarray, weights: np.ndarray, units: np.ndarray | None = None) -> Interval:
    base, other = (means(weights, loss=values) for values in (np.zeros(len(changes)), changes))
    return paired_intervals(base, other, units)["loss"]


def test_of_a_mean_it_is_the_normal_one() -> None:
    found = interval(CHANGES, ONES)
    half = 1.96 * CHANGES.std() / 20
    assert (found.low, found.high) == pytest.approx((CHANGES.mean() - half, CHANGES.mean() + half), abs=0.02)
    assert found.difference == pytest.approx(CHANGES.mean())
    assert found.verdict(lower_is_better=True) == "worse"
    assert found.verdict(lower_is_better=False) == "better"
    assert interval(CHANGES - CHANGES.mean(), ONES).verdict(lower_is_better=True) == "no_difference"


def test_rows_that_belong_together_are_drawn_together() -> None:
    four_times, units = np.repeat(CHANGES[:100], 4), np.repeat(np.arange(100), 4)
    apart, together = interval(four_times, ONES), interval(four_times, ONES, units)
    assert together.high - together.low == pytest.approx(2 * (apart.high - apart.low), rel=0.1)


def test_rows_count_by_their_targets() -> None:
    found = interval(np.array([1.0, 30.0]), np.array([1.0, 10.0]))
    assert (found.low, found.high) == (1.0, 3.0)
