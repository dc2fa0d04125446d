"""The dtype and memory of an adapter's weights in a model, where PEFT's options ask for others."""

from __future__ import annotations

import torch
from torch import nn

from peftcli.core.layer import adapter_dtype, adapter_layers, base_module, plain_dtype
from peftcli.core.quantised import FLOATS
from peftcli.core.weights import file_tensors


def cast_weights(model: nn.Module, adapter: str, *, as_base: bool = False) -> None:
    """Hold the adapter's weights in float32 or wider, or in the dtypes of the layers that they adapt."""
    for layer in adapter_layers(model, adapter).values():
        found = [value.dtype for value in base_module(layer).parameters() if value.dtype in FLOATS]
        base = found[0] if found else plain_dtype(model)
        for value in {**layer.own_tensors(), **layer.fixed_tensors()}.values():
            if value.is_floating_point():
                value.data = value.data.to(base if as_base else adapter_dtype(value))


def empty_state(model: nn.Module, adapter: str) -> None:
    """Move the tensors that the adapter's file holds to the meta device, to be filled by ``load_state``."""
    files = file_tensors(model, adapter).values()
    for value in [part for layer, tensor, whole in files for part in layer.held(tensor, whole)]:
        empty = torch.empty_like(value, device="meta")
        torch.utils.swap_tensors(
            value, nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
        )
