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
