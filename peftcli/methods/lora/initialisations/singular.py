"""What the initialisations from singular vectors share."""

from __future__ import annotations

import torch

from peftcli.errors import AdapterError

Pair = tuple[torch.Tensor, torch.Tensor]
"""A and B."""


def balanced(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor) -> Pair:
    """Return A and B whose product is ``u diag(s) vh``, each with the roots of s."""
    return s.sqrt().unsqueeze(1) * vh, u * s.sqrt()


def check_directions(weight: torch.Tensor, r: int) -> None:
    """Raise AdapterError if a weight has fewer than r singular values."""
    if r > min(weight.shape):
        raise AdapterError(
            f"is {r}, and a layer of {weight.shape[0]} x {weight.shape[1]} has fewer directions", key="r"
        )
