"""Which examples share a packed row."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

_STEPS = 32
"""Number of length classes. More of them fill rows better; fewer of them make the packing of epochs differ more."""


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
