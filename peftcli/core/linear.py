"""One view of "a linear layer", however the base model stores it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftcli.core.layer import base_module, check_not_offloaded, widened
from peftcli.core.quantised import dequantised_weight, is_packed, is_quantised

PLAIN_WEIGHTS: set[type] = {nn.Parameter}
"""Types of weights that are ordinary numbers, unlike quantised ones; ``train.memory.sizes`` adds one without values."""


@dataclass(frozen=True)
class Linear:
    """Sizes and orientation of a linear layer."""

    in_features: int
    out_features: int
    transposed: bool
    """Whether the weight is stored (in, out), as in GPT-2's Conv1D."""

    def as_stored(self, weight: torch.Tensor) -> torch.Tensor:
        """Turn a weight (out, in) into the layer's own orientation, or back."""
        return weight.T if self.transposed else weight


def linear_view(module: Any) -> Linear | None:
    """Return the view of ``module``, or of the module below its adapter layers; None if that is not a linear layer."""
    module = base_module(module)
    if is_packed(module) or (isinstance(module, nn.Linear) and _gives_outputs(module)):
        return Linear(module.in_features, module.out_features, transposed=False)
    if type(module).__name__ == "Conv1D" and "nf" in vars(module):  # transformers', which core does not import
        rows, columns = module.weight.shape
        return Linear(rows, columns, transposed=True)
    return None


def needs_no_trial(layer: Any, kind: Any) -> bool:
    """Return whether a layer has the forward of torch's ``kind``, or is a quantiser's, which is taken for right."""
    own = type(layer)
    if own.forward is kind.forward or own.__module__.startswith("transformers.integrations."):
        return True
    return is_quantised(layer) or type(layer._parameters.get("weight")) not in PLAIN_WEIGHTS


def _gives_outputs(layer: nn.Linear) -> bool:
    """Return whether a layer of a class of its own gives one output (..., out) for an input (..., in).

    A router of experts may give scores and indices, and a grouped layer takes another input. It is tried out on
    tensors without values; layers of quantisers are not, whose kernels need values.
    """
    kind: Any = type(layer)
    if needs_no_trial(layer, nn.Linear):
        return True
    dtype, empty = layer.weight.dtype, kind.__new__(kind)
    weights = {name: value if value is None else value.to("meta") for name, value in layer._parameters.items()}
    weights["weight"] = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device="meta")
    vars(empty).update(vars(layer), _parameters=weights)
    try:
        made = kind.forward(empty, torch.empty(3, 1, layer.in_features, dtype=dtype, device="meta"))
    except Exception:  # whatever code the class has
        return False
    return isinstance(made, torch.Tensor) and made.shape == (3, 1, layer.out_features)


def dense_weight(module: nn.Module) -> torch.Tensor:
    """Return the weight (out, in) of a linear layer, dequantised if necessary, detached, in float32 or wider.

    Raises:
        AdapterError: the layer is offloaded.
    """
    layer, view = base_module(module), linear_view(module)
    assert view is not None
    check_not_offloaded(layer, f"a {type(layer).__name__}")
    if is_quantised(layer):
        return dequantised_weight(layer)
    return widened(view.as_stored(layer.weight.detach()))
