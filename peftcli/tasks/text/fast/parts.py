"""Micro-batches in parts: the same gradients, with less memory, where a part takes no longer for each token.

Where padding is computed, parts of rows of like length take less time, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peftcli.data.store import Example

PART = 512
"""Tokens of a part, at most, unless one row has more. Smaller parts are slower on a CPU."""
_COST = 1.1
"""How many tokens the parts may compute for each of the whole, which computes a beginning that rows share once."""
_BEFORE = 32
"""With how many rows before it a row is compared."""

_PART_COST = 64
"""How many tokens more a padded part may compute to be one part and not two."""

Rows = Sequence[Sequence[Example]]
"""Rows of a micro-batch: the examples of each."""


def parts_of(rows: Rows, limit: int) -> list[slice]:
    """Divide rows, in their order, into parts of at most ``limit`` tokens; larger ones where rows begin alike.

    No rows are one part.
    """
    _, whole = _divide(rows, None)
    while True:
        parts, computed = _divide(rows, limit)
        if computed <= _COST * whole:
            return parts
        limit *= 2


def parts_of_like_length(sizes: Sequence[int]) -> list[slice]:
    """Divide rows of these sizes, in their order, into parts that are padded to their longest row each."""
    best = [(0, 0)]  # of the first rows: what the best division costs, and where its last part begins
    for end in range(1, len(sizes) + 1):
        longest, found = 0, list[tuple[int, int]]()
        for start in reversed(range(end)):
            longest = max(longest, sizes[start])
            if found and (end - start) * longest + _PART_COST > min(found)[0]:
                break
            found.append((best[start][0] + (end - start) * longest + _PART_COST, start))
        best.append(min(found))
    parts, end = list[slice](), len(sizes)
    while end:
        start = best[end][1]
        parts.append(slice(start, end))
        end = start
    return parts[::-1]


def _divide(rows: Rows, limit: int | None) -> tuple[list[slice], int]:
    """The parts, and how many tokens they compute in all."""
    parts, texts, start, size, computed = list[slice](), list[np.ndarray](), 0, 0, 0
    for at, examples in enumerate(rows):
        row = [np.asarray(each.arrays["input_ids"]) for each in examples]
        added = _added(row, texts)
        if limit is not None and at > start and size + added > limit:
            parts.append(slice(start, at))
            computed += size
            texts, start, size = [], at, 0
            added = _added(row, texts)
        texts += row
        size += added
    return [*parts, slice(start, len(rows))], computed + size


def _added(row: Sequence[np.ndarray], before: Sequence[np.ndarray]) -> int:
    """How many tokens a row adds to those before it."""
    texts, added = list(before[-_BEFORE:]), 0
    for text in row:
        added += len(text) - max((_alike(text, other) for other in texts), default=0)
        texts.append(text)
    return added


def _alike(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two texts have in common from their first one on."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length
