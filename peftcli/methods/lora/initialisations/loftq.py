"""LoftQ: LoRA-Fine-Tuning-aware Quantization (https://arxiv.org/abs/2310.08659)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from peftcli.core.layer import base_module
from peftcli.core.linear import dense_weight
from peftcli.core.quantised import is_quantised
from peftcli.errors import AdapterError
from peftcli.methods.lora.initialisations.pissa import pissa
from peftcli.methods.lora.lora import LoraLinear, lora_layers

_KEY = "init_lora_weights"


@torch.no_grad()
def start_loftq(
    model: nn.Module,
    weight: Callable[[str], torch.Tensor],
    adapter: str | None = None,
    keep: Callable[[str], bool] = lambda name: True,
) -> None:
    """Start the LoRA layers over quantised layers from the largest singular values that quantisation took away.

    Args:
        model: the model, quantised.
        weight: returns the base weight of that name as it was before.
        adapter: name of the adapter, of several.
        keep: called with the name of each layer that was started. Where it returns False, the layer is put back.

    Raises:
        AdapterError: no layer is quantised, or a weight is of another shape.
    """
    layers = {
        name: layer
        for name, layer in lora_layers(model, adapter).items()
        if isinstance(layer, LoraLinear) and is_quantised(base_module(layer))
    }
    if not layers:
        raise AdapterError("loftq makes up for the error of a quantised base model, and this one is not", key=_KEY)
    for name, layer in layers.items():
        quantised = dense_weight(layer.base_layer)
        original = weight(f"{name}.weight").to(quantised)
        if getattr(base_module(layer), "source_cls", nn.Linear).__name__ == "Conv1D":  # bitsandbytes turns it round
            original = original.T
        if original.shape != quantised.shape:
            shapes = f"{tuple(original.shape)}, the model needs {tuple(quantised.shape)}"
            raise AdapterError(f"the base weight of {name} is {shapes}", key=_KEY)
        own = (layer.lora_A.weight, layer.lora_B.weight)
        before = [value.clone() for value in own]
        for value, new in zip(own, pissa(original - quantised, layer.r, layer.scaling), strict=True):
            value.copy_(new)
        if not keep(name):
            for value, old in zip(own, before, strict=True):
                value.copy_(old)
