"""Contrastive loss: the positive of each anchor among the texts of all rows, in all processes.

In-batch negatives: https://arxiv.org/abs/1705.00652
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

_CHUNK = 512
"""Anchors that are compared with all candidates at once."""
_ROUNDING = 1e-6
"""Difference of cosines that counts as none."""


class Texts(NamedTuple):
    """The texts of rows as a loss compares them: anchors, then positives, then negatives."""

    embeddings: torch.Tensor
    """Of length 1: (R, D)."""
    keys: torch.Tensor
    """The key of each text, and the key of the anchor whose positive it is: (R, 2)."""
    anchors: int
    """How many of them are anchors; as many are positives."""


def contrastive_loss(mine: Texts, temperature: float) -> torch.Tensor:
    """The loss of this process's rows, with the gradient of that of all rows with regard to its embeddings.

    All processes call this, or ``gather_no_texts``.
    """
    number, count = _process()
    if count == 1:
        return anchor_losses([mine], temperature).sum()
    embeddings, keys = _gathered(mine.embeddings), _gathered(mine.keys)
    anchors = [int(each) for each in _gathered(torch.full((1, 1), mine.anchors, device=mine.keys.device))]
    every = [Texts(*each) for each in zip(embeddings, keys, anchors, strict=True)]
    every[number] = mine
    losses = anchor_losses(every, temperature).split(anchors)
    own = losses[number].sum()
    others = sum((each.sum() for at, each in enumerate(losses) if at != number), own.new_zeros(()))
    return own + (others - others.detach())


def gather_no_texts(device: torch.device) -> None:
    """Take part in ``contrastive_loss`` without a text."""
    for width, dtype in ((0, torch.float32), (0, torch.long), (1, torch.long)):
        _gathered(torch.zeros(width, width, dtype=dtype, device=device))


def anchor_losses(every: Sequence[Texts], temperature: float) -> torch.Tensor:
    """The cross-entropy of each anchor's positive among all positives and negatives: (N,)."""
    anchors = torch.cat([each.embeddings[: each.anchors] for each in every])
    candidates = torch.cat([each.embeddings[each.anchors :] for each in every])
    asking = torch.cat([each.keys[: each.anchors, 0] for each in every])
    keys = torch.cat([each.keys[each.anchors :] for each in every])
    before = np.cumsum([0, *(len(each.embeddings) - each.anchors for each in every)])[:-1]
    own = torch.cat(
        [at + torch.arange(each.anchors, device=keys.device) for at, each in zip(before.tolist(), every, strict=True)]
    )
    right = _right(asking[:, None], keys[own, :1], keys[:, 0], keys[:, 1])
    distinct, text = keys[:, 0].unique(return_inverse=True)
    answers = torch.zeros(len(own), len(distinct), device=keys.device).index_add_(1, text, right.float())
    right = answers[:, text] > 0  # a right text is right where it is another row's negative, too
    right[torch.arange(len(own), device=own.device), own] = False
    cosines = (anchors @ candidates.T).masked_fill(right, -math.inf)
    return F.cross_entropy(cosines / temperature, own, reduction="none")


def ranks_and_losses(outputs: Sequence[Any], temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """The rank of each row's positive among all distinct texts, and its cross-entropy.

    Other right answers to the anchor are left out; texts that are as close as the positive come before it.
    """
    vectors = np.concatenate([each[1:] for each, *_ in outputs])
    asking = np.array([keys[0] for _, keys, _ in outputs])
    asked = np.concatenate([[keys[0], *keys[2:]] for _, keys, _ in outputs])
    held = np.concatenate([keys[1:] for _, keys, _ in outputs])
    own = np.cumsum([0, *(len(keys) - 1 for _, keys, _ in outputs)])[:-1]
    order = np.argsort(held, kind="stable")
    starts = np.flatnonzero(np.diff(held[order], prepend=held[order[0]] - 1))
    distinct = vectors[order[starts]]
    ranks, losses = [], []
    for start in range(0, len(own), _CHUNK):
        some = own[start : start + _CHUNK]
        anchors = np.stack([outputs[start + at][0][0] for at in range(len(some))])
        right = _right(asking[start : start + _CHUNK, None], held[some, None], held, asked)
        wrong = ~np.logical_or.reduceat(right[:, order], starts, axis=1)
        cosines = (anchors @ distinct.T).astype(np.float64)
        mine = (anchors * vectors[some]).sum(1, keepdims=True).astype(np.float64)
        ranks.append(1 + (~(cosines < mine - _ROUNDING) & wrong).sum(1))  # NaN is never right
        others = np.exp((cosines - mine) / temperature) * wrong
        losses.append(np.log1p(others.sum(1)))
    return np.concatenate(ranks), np.concatenate(losses)


def _right(asking: Any, positive: Any, keys: Any, asked: Any) -> Any:
    """Which candidates are no wrong answer to an anchor: (N, M), of arrays or tensors.

    They are its positive, the positives of equal anchors, and the anchor's own text.

    Args:
        asking: The key of each anchor, (N, 1).
        positive: That of its positive, (N, 1).
        keys: Those of the candidates, (M,).
        asked: Those of the anchors that the candidates are the positives of, (M,).
    """
    return (keys == positive) | (keys == asking) | (asked == asking)


def _process() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _gathered(rows: torch.Tensor) -> list[torch.Tensor]:
    """The rows (R, D) of each process, in the processes' order, without gradients. All processes call this.

    R may differ between processes, and D where R is 0.
    """
    count = _process()[1]
    if count == 1:
        return [rows]
    shape = torch.tensor(rows.shape, device=rows.device)
    shapes = [torch.zeros_like(shape) for _ in range(count)]
    torch.distributed.all_gather(shapes, shape)
    most, width = torch.stack(shapes).amax(0).tolist()
    padded = F.pad(rows.detach(), (0, width - rows.shape[1], 0, most - rows.shape[0]))
    found = [torch.empty_like(padded) for _ in range(count)]
    torch.distributed.all_gather(found, padded.contiguous())
    return [each[: int(size[0])] for each, size in zip(found, shapes, strict=True)]
