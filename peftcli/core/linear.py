"""One view of "a linear layer", however the base model stores it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftcli.core.layer import adapter_dtype, base_module
from peftcli.core.quantised import dequantised_weight, is_packed, is_quantised
from peftcli.errors import AdapterError


@dataclass(frozen=True)
class Linear:
    """What an adapter needs to know of a linear layer."""

    in_features: int
    out_features: int
    transposed: bool
    """Whether the weight is stored (in, out), as in GPT-2's Conv1D."""

    def as_stored(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` of shape (out, in), in the layer's own orientation; and the other way round."""
        return weight.T if self.transposed else weight


def linear_view(module: Any) -> Linear | None:
    """The view of ``module``, or of the layer below its adapter layers; None when it is no linear layer."""
    module = base_module(module)
    if isinstance(module, nn.Linear) or is_packed(module):
        return Linear(module.in_features, module.out_features, transposed=False)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers', which core does not import
        rows, columns = module.weight.shape
        return Linear(rows, columns, transposed=True)
    return None


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight (out, in) of a linear layer, dequantised if need be, detached, in float32 or wider."""
    layer, view = base_module(module), linear_view(module)
    assert view is not None
    if is_quantised(layer):
        return dequantised_weight(layer)
    weight = layer.weight.detach()
    return view.as_stored(weight).to(adapter_dtype(weight))


def stored_weight(module: nn.Module) -> torch.Tensor:
    """The tensor that holds the layer's weight in whatever form: it says on which device, not what."""
    layer = base_module(module)
    weight: torch.Tensor = layer.qweight if is_packed(layer) else layer.weight
    return weight


def require_linear(module: nn.Module, name: str, method: str, kinds: str = "Linear and Conv1D") -> Linear:
    """The view of ``module``.

    Raises:
        AdapterError: it is no linear layer; ``method`` adapts ``kinds`` only.
    """
    view = linear_view(module)
    if view is None:
        raise AdapterError(
            f"{name} is a {type(base_module(module)).__name__}; {method} adapts {kinds}", key="target_modules"
        )
    return view
