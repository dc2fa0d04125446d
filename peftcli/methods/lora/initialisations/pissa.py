"""PiSSA: Principal Singular Values and Singular Vectors Adaptation (https://arxiv.org/abs/2404.02948)."""

from __future__ import annotations

import torch

from peftcli.methods.lora.initialisations.singular import Pair, balanced


def pissa(weight: torch.Tensor, r: int, scaling: float) -> Pair:
    """Return the r largest singular values, half of each in A, half in B."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return balanced(u[:, :r], s[:r] / scaling, vh[:r])


def fast_pissa(weight: torch.Tensor, r: int, scaling: float, iterations: int) -> Pair:
    """Return the same by a randomised decomposition, the better the more iterations."""
    u, s, v = torch.svd_lowrank(weight, q=r, niter=iterations)
    return balanced(u, s / scaling, v.T)
