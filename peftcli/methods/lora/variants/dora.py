"""DoRA: Weight-Decomposed Low-Rank Adaptation (https://arxiv.org/abs/2402.09353).

A LoRA layer that holds ``lora_magnitude_vector``, a trained length ``m`` for each output, computes with ``m V / |V|``
where ``V = W + delta``. No gradient flows through the norm, as in section 4.3 of the paper. Among several adapters on
one layer, each takes its norm with the base model's own weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import AdapterLayer, TrainedBias, base_module, layers_below, version_of, widened
from peftcli.core.linear import dense_weight, linear_view
from peftcli.methods.lora.fused import Switch

CACHE = Switch(enabled=False)
"""Whether layers in evaluation mode keep their ``factor`` until a weight changes."""


def add_magnitude(layer: AdapterLayer) -> None:
    """Give a LoRA layer the lengths of its weight: (out,); of a convolution (1, out, 1, ...); of an embedding (D,)."""
    norm = _norm(layer, _adapted_weight(layer))
    layer.lora_magnitude_vector = nn.Parameter(norm.view(1, -1, *_places(layer)) if _places(layer) else norm)


def update(layer: AdapterLayer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return what the adapter adds to the base layer's output ``y = W x + b``.

    ``x`` is the input after dropout, which falls on all that differs from the base layer.
    """
    ratio = factor(layer).view(-1, *_places(layer))
    bias = _bias(layer, base_module(layer).bias)
    if not layer.training or isinstance(layer.lora_dropout, nn.Identity):
        plain = y if bias is None else y - bias.view(-1, *_places(layer))
    elif linear_view(layer) is not None:
        plain = F.linear(x, dense_weight(layer))
    else:
        plain = base_module(layer)._conv_forward(x, _base_weight(layer), None)
    return (ratio - 1) * plain + ratio * layer.update(x)


def factor(layer: AdapterLayer) -> torch.Tensor:
    """Return ``m / |V|``: (out,)."""
    if layer.training or not CACHE.enabled:
        vars(layer).pop("kept_factor", None)
        return _over_norm(layer, _adapted_weight(layer))
    weights = [*layer.own_tensors().values(), *base_module(layer).parameters(recurse=False)]
    state = (layer.scaling, *((value.data_ptr(), version_of(value)) for value in weights))
    if vars(layer).get("kept_factor", (None,))[0] != state:
        vars(layer)["kept_factor"] = (state, _over_norm(layer, _adapted_weight(layer)).detach())
    return vars(layer)["kept_factor"][1]


def folded_over(
    layer: AdapterLayer, base: dict[str, torch.Tensor], below: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return ``AdapterLayer.folded_over`` of a layer that holds a magnitude."""
    weight = layer.merged_tensors(base | below)["weight"]
    ratio = _over_norm(layer, layer.merged_tensors(base)["weight"])
    merged = {"weight": (ratio if _in_columns(layer) else ratio.view(-1, *[1] * (weight.ndim - 1))) * weight}
    own = _bias(layer, base.get("bias"))
    if own is not None and "bias" in below:
        merged["bias"] = own + ratio * (below["bias"] - own)
    return merged


def _over_norm(layer: AdapterLayer, weight: torch.Tensor) -> torch.Tensor:
    """Return ``m / |weight|``: (out,). An output that is zero in the base model is no division by zero."""
    norm = _norm(layer, weight)
    length: torch.Tensor = layer.lora_magnitude_vector
    return length.flatten() / norm.clamp(min=torch.finfo(norm.dtype).tiny)


def _norm(layer: AdapterLayer, weight: torch.Tensor) -> torch.Tensor:
    """Return the length of each output's part of a weight in the base layer's shape: (out,)."""
    return (weight.T if _in_columns(layer) else weight.flatten(1)).norm(dim=1)


def _in_columns(layer: AdapterLayer) -> bool:
    """Return whether the last dimension of the base weight counts the outputs, not the first."""
    view = linear_view(layer)
    return isinstance(base_module(layer), nn.Embedding) or (view is not None and view.transposed)


def _places(layer: AdapterLayer) -> list[int]:
    """Return a one for each dimension that an output has after its channels."""
    return [1] * len(getattr(base_module(layer), "kernel_size", ()))


@torch.no_grad()
def _adapted_weight(layer: AdapterLayer) -> torch.Tensor:
    """Return ``V`` with the base model's own ``W``, in the base layer's shape."""
    return _base_weight(layer) + layer.delta()


def _base_weight(layer: AdapterLayer) -> torch.Tensor:
    if (view := linear_view(layer)) is not None:
        return view.as_stored(dense_weight(layer))
    weight: torch.Tensor = base_module(layer).weight.detach()
    return widened(weight)


def _bias(layer: AdapterLayer, base: torch.Tensor | None) -> torch.Tensor | None:
    """Return the bias that the layer's base layer, whose own is ``base``, adds to rows of this adapter."""
    biases = [below.own_tensors()["bias"] for below in layers_below(layer) if isinstance(below, TrainedBias)]
    return biases[0] if biases else base
