"""Which rows taught an answer: influence of training rows on a loss, from the gradients of both.

``tracin`` is the dot product of the gradients (https://arxiv.org/abs/2002.08484), times the learning rate, summed over
checkpoints. ``datainf`` (https://arxiv.org/abs/2310.00902) first multiplies the gradient of the answer by an inverse
Hessian, of which it takes the mean of the inverses that each row alone would give: a closed form.
A score above 0: training on the row has lowered the loss of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peftcli.adapters.proof.gradient_index import GradientIndex

_NEIGHBOURS = 10
_MOST = 4096
"""Rows that each row is compared with; of more, some spread evenly."""
_DAMPING = 0.1
"""Of the inverse Hessian, as a share of the mean square of a gradient's elements, as in the paper."""


def dot_products(index: GradientIndex, gradient: np.ndarray) -> np.ndarray:
    """Return the dot product of each row's gradient with ``gradient``."""
    out = np.zeros(len(index), np.float32)
    for rows, sketches in index.chunks():
        out[rows] = sketches @ gradient
    return out


def lengths(index: GradientIndex) -> np.ndarray:
    """Return the length of each row's gradient."""
    out = np.zeros(len(index), np.float32)
    for rows, sketches in index.chunks():
        out[rows] = np.linalg.norm(sketches, axis=1)
    return out


def precondition(
    index: GradientIndex, gradient: np.ndarray, blocks: Sequence[slice], parameters: Sequence[int]
) -> np.ndarray:
    """Return DataInf's product of the inverse Hessian with ``gradient``, block by block.

    Of a block, with the gradients ``g`` of n rows: ``v`` is multiplied by the mean over the rows of
    ``(I - g g' / (damping + g' g)) / damping``. ``parameters`` has the number of parameters of each block.
    """
    count, starts = len(index), [block.start for block in blocks]
    squares = np.zeros(len(blocks))
    for _, sketches in index.chunks():
        squares += np.add.reduceat(sketches**2, starts, axis=1).sum(0)
    damping = np.maximum(_DAMPING * squares / count / np.asarray(parameters), 1e-30)
    taken = np.zeros(len(gradient))
    widths = [block.stop - block.start for block in blocks]
    for _, sketches in index.chunks():
        along = np.add.reduceat(sketches * gradient, starts, axis=1)
        shares = along / (damping + np.add.reduceat(sketches**2, starts, axis=1))
        taken += (sketches * np.repeat(shares, widths, axis=1)).sum(0)
    return ((gradient - taken / count) / np.repeat(damping, widths)).astype(np.float32)


def agreement(index: GradientIndex) -> np.ndarray:
    """Return how far each row's neighbours teach the same: the mean cosine with the gradients that are most like it.

    Rows of like inputs have gradients along one line; of opposite answers, in opposite directions. So the nearest are
    those of the largest cosine, whatever its sign, and a row whose label is wrong has a mean below 0.
    """
    count = len(index)
    chosen = np.unique(np.linspace(0, count - 1, min(count, _MOST)).round().astype(np.int64))
    others, out = _unit(index.rows(chosen)), np.zeros(count, np.float32)
    nearest = min(_NEIGHBOURS, len(chosen) - 1)
    if nearest < 1:
        return out
    for rows, sketches in index.chunks():
        cosines = _unit(sketches) @ others.T
        cosines[rows[:, None] == chosen[None]] = 0  # each with itself
        near = np.argpartition(-np.abs(cosines), nearest - 1, axis=1)[:, :nearest]
        out[rows] = np.take_along_axis(cosines, near, axis=1).mean(1)
    return out


def mislabelled_score(agrees: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Return a number for each row that is the larger, the more the row looks mislabelled.

    Both are (N,): ``agreement`` with the row's neighbours, and the length of its gradient.
    """
    return (1 - agrees) * length


def _unit(sketches: np.ndarray) -> np.ndarray:
    return sketches / np.maximum(np.linalg.norm(sketches, axis=1, keepdims=True), 1e-30)
