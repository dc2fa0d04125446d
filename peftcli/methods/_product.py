"""The product with the base weight, for methods that take part of it away."""

from __future__ import annotations

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer, TrainedBias, base_module, widened


def base_product(layer: AdapterLayer, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    """``W x`` with the base model's own weight, without bias: (..., out), in float32 or wider.

    ``y``, if given, is what the layer's base layer made of ``x``: it serves unless other adapters stand below.
    """
    if y is None or isinstance(layer_below(layer), AdapterLayer):
        y, bias = base_module(layer)(x), base_module(layer).bias
    else:
        bias = layer.base_layer.bias
    return widened(y) if bias is None else widened(y) - widened(bias)


def layer_below(layer: AdapterLayer) -> nn.Module:
    """The layer that this adapter changes: another adapter's, or the base model's. A trained bias is this adapter's."""
    return layer.base_layer.base_layer if isinstance(layer.base_layer, TrainedBias) else layer.base_layer
