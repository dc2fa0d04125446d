"""OLoRA: Orthonormal Low-Rank Adaptation (https://arxiv.org/abs/2406.01775)."""

from __future__ import annotations

import torch

from peftcli.methods.lora.initialisations.singular import Pair


def olora(weight: torch.Tensor, r: int, scaling: float) -> Pair:
    """Return the first r rows of R as A and the first r columns of Q as B, of ``weight = Q R``."""
    q, upper = torch.linalg.qr(weight)
    return upper[:r], q[:, :r]
