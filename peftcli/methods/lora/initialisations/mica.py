"""MiCA (https://arxiv.org/abs/2604.01694): B keeps the weakest directions of the base weight, and only A trains."""

from __future__ import annotations

import torch

from peftcli.methods.lora.initialisations.singular import Pair


def mica(weight: torch.Tensor, r: int, scaling: float) -> Pair:
    """Return zero as A and the r smallest left singular vectors as B."""
    u, _, _ = torch.linalg.svd(weight, full_matrices=False)
    return weight.new_zeros(r, weight.shape[1]), u[:, -r:]
