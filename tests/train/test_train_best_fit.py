"""Which examples go together into a row."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from peftcli.train.plan import best_fit


def textbook(lengths: list[int], max_length: int) -> list[int]:
    """What each row is left with, sorted: best fit in decreasing order, written out."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting) if fitting else max(max_length, length)
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    return sorted(rooms)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), max_length=st.integers(10, 63))
def test_best_fit_is_the_textbooks(lengths: list[int], max_length: int) -> None:
    """With rows this short, each length is a step of its own."""
    rows = best_fit(np.array(lengths), max_length)
    filled = np.bincount(rows, lengths).astype(int)
    assert set(rows.tolist()) == set(range(len(filled)))
    assert (np.bincount(rows)[filled > max_length] == 1).all(), "only one example can be longer than a row"
    assert sorted((np.maximum(max_length, filled) - filled).tolist()) == textbook(lengths, max_length)


@given(lengths=st.lists(st.integers(1, 1000), min_size=2, max_size=60))
def test_no_two_rows_would_fit_into_one(lengths: list[int]) -> None:
    filled = sorted(np.bincount(best_fit(np.array(lengths), 1000), lengths))
    assert filled[-1] <= 1000
    assert len(filled) == 1 or filled[0] + filled[1] > 1000


def test_another_order_packs_other_examples_together() -> None:
    lengths = np.random.default_rng(0).integers(42, 513, 400)

    def pairs(seed: int) -> set[tuple[int, int]]:
        order = np.random.default_rng(seed).permutation(400)
        rows = best_fit(lengths[order], 1024)
        together = [order[rows == row].tolist() for row in range(rows.max() + 1)]
        return {(a, b) for row in together for a in row for b in row if a < b}

    assert len(pairs(1) & pairs(2)) < len(pairs(1)) / 5


def test_best_fit_fills_rows() -> None:
    lengths = np.random.default_rng(0).integers(42, 513, 10_000)
    rows = best_fit(lengths, 1024)
    assert lengths.sum() / (1024 * (rows.max() + 1)) > 0.99
