"""Packing: several examples in one row of a batch, none of which sees another."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from peftcli.data.store import Example
from peftcli.tasks.text.chat import IGNORED

_STEPS = 32
"""Lengths are told apart in so many steps. More fill rows better, fewer pack an epoch less like the one before."""


def join(examples: Sequence[Example]) -> Example:
    """The examples as one row, with ``position_ids`` that start at 0 in each: by them a model knows where one ends.

    The first label of each is left out of the loss, since it would be predicted from the example before.
    """
    arrays = {
        "input_ids": np.concatenate([each.arrays["input_ids"] for each in examples]),
        "labels": np.concatenate([[IGNORED, *each.arrays["labels"][1:]] for each in examples]),
        "position_ids": np.concatenate([np.arange(len(each.arrays["input_ids"])) for each in examples]),
    }
    return Example(arrays, sum(each.size for each in examples), sum(each.num_targets for each in examples))


def best_fit(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """The number, from 0, of the row of at most ``max_length`` tokens that each example goes into.

    Longest first, each into the fullest row that still has room for it. Those of about the same length keep the order
    that they are given in: so another order packs other examples together. A longer one than ``max_length`` has a row
    to itself.
    """
    order = np.argsort(-(lengths // max(1, max_length // _STEPS)), kind="stable")
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
