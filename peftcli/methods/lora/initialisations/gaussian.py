"""``init_lora_weights: gaussian``."""

from __future__ import annotations

import torch
from torch import nn


def gaussian(a: torch.Tensor, b: torch.Tensor) -> None:
    """Draw A from a normal distribution with standard deviation 1/r and set B to zero."""
    nn.init.normal_(a, std=1 / len(a))
    nn.init.zeros_(b)
