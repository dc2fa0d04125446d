"""The mean average precision of boxes by COCO's rules, equal to that of pycocotools.

A detection is right at a threshold if it overlaps an object of its class, that no surer one has taken, by that share of
their union. Precision is averaged over 101 recalls, ten thresholds and the classes that have objects
(https://cocodataset.org/#detection-eval).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Of the overlap."""
MOST = 100
"""Detections of a class that count in a picture, the surest ones."""
_RECALLS = np.linspace(0, 1, 101)
_AT_75 = 5
_NEARLY_1 = 1 - 1e-10


@dataclass(frozen=True)
class Matches:
    """The detections of one class in one picture, the surest first, and which of them are right."""

    scores: np.ndarray
    """(D,)."""
    right: np.ndarray
    """(T, D): at each threshold."""
    ignored: np.ndarray
    """(T, D): whether it lies on a crowd, so that it is neither right nor wrong."""
    objects: int
    """How many there are to find."""


def overlaps(found: np.ndarray, wanted: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Return which share (D, G) of their union boxes [x, y, width, height] have in common; of a crowd, of the found."""
    ends = [each[:, :2] + each[:, 2:] for each in (found, wanted)]
    sides = np.minimum(ends[0][:, None], ends[1]) - np.maximum(found[:, None, :2], wanted[:, :2])  # (D, G, 2)
    shared = np.prod(sides.clip(min=0), axis=-1)
    areas = [np.prod(each[:, 2:], axis=1) for each in (found, wanted)]
    union = np.where(crowd, areas[0][:, None], areas[0][:, None] + areas[1] - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def match_boxes(found: np.ndarray, scores: np.ndarray, wanted: np.ndarray, crowd: np.ndarray) -> Matches:
    """Match the detections of a class (D, 4) with its objects in the picture (G, 4), some of which are a crowd."""
    surest = np.argsort(-scores, kind="stable")[:MOST]
    last = np.argsort(crowd, kind="stable")  # crowds take what nothing else does
    found, scores, crowd = found[surest], scores[surest], crowd[last]
    shares = overlaps(found, wanted[last], crowd)
    right, ignored = (np.zeros((len(THRESHOLDS), len(found)), bool) for _ in range(2))
    near = np.flatnonzero(shares.max(axis=1, initial=0) >= THRESHOLDS[0])
    for at, threshold in enumerate(THRESHOLDS):
        free = np.ones(len(crowd), bool)
        for each in near:
            best = _best(shares[each], free, crowd, min(float(threshold), _NEARLY_1))
            if best is not None:
                free[best] = crowd[best]
                right[at, each], ignored[at, each] = not crowd[best], crowd[best]
    return Matches(scores, right, ignored, int((~crowd).sum()))


def _best(shares: np.ndarray, free: np.ndarray, crowd: np.ndarray, least: float) -> int | None:
    """The free object with the largest share, of equal ones the last; a crowd only where there is no other."""
    for kind in (~crowd, crowd):
        able = np.flatnonzero(free & kind & (shares >= least))
        if len(able):
            return int(able[::-1][np.argmax(shares[able[::-1]])])
    return None


def average_precision(pictures: Sequence[Mapping[int, Matches]]) -> dict[str, float]:
    """Return ``map``, ``map_50`` and ``map_75`` of pictures, each with the matches of its classes.

    Empty: there is nothing to find.
    """
    found = list[np.ndarray]()
    for name in sorted({name for each in pictures for name in each}):
        matches = [each[name] for each in pictures if name in each]
        if objects := sum(each.objects for each in matches):
            found.append(_of_class(matches, objects))
    if not found:
        return {}
    of_thresholds = np.mean(found, axis=(0, 2))  # (T,), of (C, T, R)
    return {
        "map": float(of_thresholds.mean()),
        "map_50": float(of_thresholds[0]),
        "map_75": float(of_thresholds[_AT_75]),
    }


def _of_class(matches: Sequence[Matches], objects: int) -> np.ndarray:
    """The precision (T, R) at each threshold and recall."""
    order = np.argsort(-np.concatenate([each.scores for each in matches]), kind="stable")
    right, ignored = (
        np.concatenate([getattr(each, name) for each in matches], axis=1) for name in ("right", "ignored")
    )
    hits = np.cumsum(right[:, order], axis=1, dtype=np.float64)
    misses = np.cumsum(~(right | ignored)[:, order], axis=1, dtype=np.float64)
    precision = hits / (hits + misses + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # the best at this recall or a larger one
    at_recalls = np.zeros((len(THRESHOLDS), len(_RECALLS)))
    for at, recall in enumerate(hits / objects):
        places = np.searchsorted(recall, _RECALLS, side="left")
        there = places < recall.size
        at_recalls[at, there] = precision[at, places[there]]
    return at_recalls
