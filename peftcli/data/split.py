"""The split of rows into those to train on and those that ``dataset.eval_fraction`` holds out for evaluation.

Rows that belong together form a group, which stays on one side: rows with equal or nearly equal inputs, with the same
value in ``dataset.group_by``, or with a part of the input in common (a prompt, a premise, a context). A part that many
rows have does not count. Groups are found from hashes: the rows are read once, and some 200 bytes a row
are held.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from peftcli.data.duplicates import find_duplicates, most_shared
from peftcli.data.store import Selection, View
from peftcli.data.used_rows import UsedRows
from peftcli.errors import DataError

_ALIKE = 0.4
"""The Jaccard index from which rows stay on one side. It is lower than that of a finding: some rows too many that stay
together do no harm."""


def split_parts(
    parts: Sequence[Selection], fraction: float, seed: int, identity: Sequence[str], label_columns: Sequence[str]
) -> tuple[list[Selection], list[Selection]]:
    """Split every part in two: the rows to train on, and those that are held out. Rows without examples stay.

    ``identity`` are the columns whose values make two inputs equal, and ``label_columns`` those of which each value
    keeps its share.

    Raises:
        DataError: the rows cannot be split.
    """
    rows = UsedRows(View(parts))
    held = np.zeros(len(rows), bool)
    if len(rows):
        classes = rows.hashes(*label_columns) if label_columns else np.zeros(len(rows), np.uint64)
        held = held_out(find_groups(rows, identity), classes, fraction, seed)
    kept, out = list[Selection](), list[Selection]()
    for at, part in enumerate(parts):
        mask = np.zeros(len(part.store.rows), bool)
        mask[rows.number[(rows.part == at) & held]] = True
        kept.append(Selection(part.store, np.flatnonzero(~mask)))
        out.append(Selection(part.store, np.flatnonzero(mask)))
    return kept, out


def find_groups(rows: UsedRows, identity: Sequence[str]) -> np.ndarray:
    """The group of each row: the number of a row in it."""
    most = most_shared(len(rows))
    links = [_equal(rows.records("group")), _equal(rows.records("shared"), most)]
    if identity:
        hashes, near = find_duplicates(rows, identity, least=_ALIKE)
        links += [_equal(hashes), (near.later, near.earlier)]
    if len(identity) > 1:  # the picture of several captions, the text of several summaries
        links.append(_equal(rows.hashes(identity[0]), most))
    return _connected(len(rows), links)


def held_out(groups: np.ndarray, classes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose the rows, as a mask, that ``eval_fraction`` holds out: whole groups, of each class as near its share.

    ``groups`` and ``classes`` are those of each row. Groups are visited in an order that depends only on the seed and
    the position of their first row, through SHA-256: it is the same in every Python version. A group is held out if
    that brings the number of rows of each class nearer to its share.

    Raises:
        DataError: there are fewer than two groups.
    """
    count, key = len(groups), "dataset.eval_fraction"
    if count < 2:
        raise DataError("one row cannot be split into training and evaluation rows", key=key)
    _, first, group, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    if len(first) < 2:
        raise DataError(
            f"all {count:,} rows belong together, so none of them can be held out",
            key=key,
            hint="Rows stay on one side if their inputs, or their values in dataset.group_by, are equal or nearly so. "
            "Name other rows for evaluation: dataset.eval.",
        )
    # The groups are ordered by the first 8 bytes of a digest: 80 MB for 10 million rows.
    starts = (hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8] for index in first.tolist())
    order = np.argsort(np.fromiter((int.from_bytes(start, "big") for start in starts), np.uint64, len(first)))
    target = min(max(1, round(count * fraction)), count - 1)
    kinds, lacking = _shares(classes, target)
    members, ends = kinds[np.argsort(group, kind="stable")].tolist(), np.cumsum(sizes).tolist()
    chosen, left = np.zeros(len(first), bool), count
    for at in order.tolist():
        of_class = Counter(members[ends[at] - sizes[at] : ends[at]])
        # how much nearer, as the sum of the squares of the rows that each class lacks
        change = sum(number * (number - 2 * lacking[kind]) for kind, number in of_class.items())
        if change < 0 and left > sizes[at]:
            chosen[at], left = True, left - sizes[at]
            for kind, number in of_class.items():
                lacking[kind] -= number
    if not chosen.any():
        chosen[order[np.argmin(sizes[order])]] = True
    return chosen[group]


def _shares(classes: np.ndarray, target: int) -> tuple[np.ndarray, list[int]]:
    """The number of each row's class, and how many of the ``target`` rows each class gets.

    Classes too small for a row of their own are one class.
    """
    _, kinds, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    small = sizes * target < len(classes)
    sizes = np.append(np.where(small, 0, sizes), sizes[small].sum())
    kinds = np.where(small, len(small), np.arange(len(small)))[kinds]
    ends = np.rint(np.cumsum(sizes) * target / len(classes)).astype(int)
    return kinds, np.diff(ends, prepend=0).tolist()


def _equal(keys: np.ndarray, most: float = np.inf) -> tuple[np.ndarray, np.ndarray]:
    """Link each row to the first one with the same key, unless it is 0 or that of more than ``most`` rows."""
    some = np.flatnonzero(keys)
    _, first, same, times = np.unique(keys[some], return_index=True, return_inverse=True, return_counts=True)
    linked = times[same] <= most
    return some[linked], some[first[same[linked]]]


def _connected(count: int, links: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The least row that each row is linked to, over any number of links."""
    one, other = (np.concatenate(each) for each in zip(*links, strict=True))
    least = np.arange(count)
    while True:
        apart = least[one] != least[other]
        one, other = one[apart], other[apart]
        if not len(one):
            return least
        a, b = least[one], least[other]
        np.minimum.at(least, np.maximum(a, b), np.minimum(a, b))
        while (least[least] != least).any():
            least = least[least]
