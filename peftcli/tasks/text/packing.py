"""Packing: several examples share a row of a batch without seeing each other."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from peftcli.data.store import Example
from peftcli.tasks.text.chat import IGNORED

_STEPS = 32
"""Number of length classes. More of them fill rows better; fewer of them make the packing of epochs differ more."""


def join(examples: Sequence[Example]) -> Example:
    """Join examples to one row. ``position_ids`` restart at 0 in each, by which a model separates them.

    The first label of each does not count in the loss, since it would be predicted from the previous example.
    """
    arrays = {
        "input_ids": np.concatenate([each.arrays["input_ids"] for each in examples]),
        "labels": np.concatenate([[IGNORED, *each.arrays["labels"][1:]] for each in examples]),
        "position_ids": np.concatenate([np.arange(len(each.arrays["input_ids"])) for each in examples]),
    }
    return Example(arrays, sum(each.size for each in examples), sum(each.num_targets for each in examples))


def best_fit(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """Assign each example to a row of at most ``max_length`` tokens; return the row's number, from 0.

    Best fit, longest first: each example goes into the fullest row that has room for it. Examples of about the same
    length keep the given order, so another order packs other examples together. An example longer than ``max_length``
    gets its own row.
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
