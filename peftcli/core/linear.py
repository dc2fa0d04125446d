"""One view of "a linear layer", however the base model stores it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Linear:
    """What an adapter needs to know of a linear layer."""

    in_features: int
    out_features: int
    transposed: bool
    """Whether the weight is stored (in, out), as in GPT-2's Conv1D."""

    def as_stored(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` of shape (out, in), in the layer's own orientation."""
        return weight.T if self.transposed else weight


def linear_view(module: Any) -> Linear | None:
    """The view of ``module``; None when it is no linear layer."""
    if isinstance(module, nn.Linear):
        return Linear(module.in_features, module.out_features, transposed=False)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers', which core does not import
        rows, columns = module.weight.shape
        return Linear(rows, columns, transposed=True)
    return None
