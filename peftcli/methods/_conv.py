"""The base of methods that add a delta to the kernel of a convolution."""

from __future__ import annotations

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer, base_module, widened
from peftcli.methods._linear import WeightDelta, dropout_layer, with_bias


class DeltaConv(AdapterLayer):
    """A convolution with the kernel ``W + delta``, both ``(out, in / groups, k...)``."""

    def __init__(self, module: nn.Module, bias: str = "none", dropout: float = 0.0):
        super().__init__(with_bias(module, bias))
        self.dropout = dropout_layer(dropout)

    def delta(self) -> torch.Tensor:
        """Return what the adapter adds to the kernel."""
        raise NotImplementedError

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the adapter adds to the output for the input ``x``, which has the adapter's dtype."""
        # with the stride, padding, ... of the base layer
        return base_module(self)._conv_forward(x, self.delta().to(x.dtype), None)

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + self.update(self.dropout(widened(x))).to(y.dtype)

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"weight": widened(base["weight"]) + self.delta()}


class WeightDeltaConv(WeightDelta, DeltaConv):
    """A convolution whose delta is made from its kernel."""

    def delta(self) -> torch.Tensor:
        return self.delta_of(widened(base_module(self).weight.detach()))
