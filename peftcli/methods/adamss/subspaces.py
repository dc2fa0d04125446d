"""Which outputs of a layer form a subspace: a decomposition of its weight, and k-means over the rows of it.

PEFT's files do not say it, so it has to be found as PEFT and scikit-learn find it, drawn numbers included.
"""

from __future__ import annotations

import numpy as np
import torch

_SEED = 123456789
_ROUNDS = 10
_TOLERANCE = 1e-4


def decompose(weight: torch.Tensor, r: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return about the first ``r`` singular vectors of ``weight``: left (out, r) and right (r, in)."""
    devices = [] if weight.device.type == "cpu" else [weight.device]
    with torch.random.fork_rng(devices, device_type=weight.device.type if devices else "cuda"):
        torch.manual_seed(seed)  # the method starts from a random matrix
        left, _, right = torch.svd_lowrank(weight, q=min(r, *weight.shape))
    return left, right.T


def cluster(points: torch.Tensor, count: int) -> torch.Tensor:
    """Return the number of the cluster of each of the ``points``, (N, r) -> (N,), by k-means from random points."""
    points = points.double().cpu()
    limit = _TOLERANCE * points.var(0, correction=0).mean()
    points = points - points.mean(0)
    shares = np.full(len(points), 1 / len(points))  # without them NumPy draws others
    first = np.random.RandomState(_SEED).choice(len(points), count, replace=False, p=shares)
    centres, labels = points[first], points.new_full((len(points),), -1, dtype=torch.long)
    for _ in range(_ROUNDS):
        before, labels = labels, _nearest(points, centres)
        if torch.equal(labels, before):
            return labels
        moved = _centres(points, labels, centres)
        shift, centres = (moved - centres).square().sum(), moved
        if shift <= limit:
            break
    return _nearest(points, centres)


def _nearest(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    return (centres.square().sum(1) - 2 * points @ centres.T).argmin(1)


def _centres(points: torch.Tensor, labels: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return the mean of each cluster's points. A cluster without any gets the point that is farthest from its own."""
    sums = torch.zeros_like(before).index_add_(0, labels, points)
    sizes = torch.bincount(labels, minlength=len(before))
    empty = (sizes == 0).nonzero().flatten().tolist()
    farthest = (points - before[labels]).square().sum(1).topk(len(empty)).indices.tolist()
    for cluster_, point in zip(empty, farthest, strict=True):
        sums[labels[point]] -= points[point]
        sizes[labels[point]] -= 1
        sums[cluster_], sizes[cluster_] = points[point], 1
    return sums / sizes.clamp(min=1).unsqueeze(1)
