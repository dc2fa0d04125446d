"""``init_lora_weights: true`` and ``false``."""

from __future__ import annotations

import math

import torch
from torch import nn


def kaiming(a: torch.Tensor, b: torch.Tensor) -> None:
    """Draw A as nn.Linear does and set B to zero, as loralib does."""
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.zeros_(b)


def random(a: torch.Tensor, b: torch.Tensor) -> None:
    """Leave B as nn.Linear drew it, so that the adapter has an effect before it is trained."""
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
