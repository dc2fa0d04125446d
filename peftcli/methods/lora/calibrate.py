"""LoRA's initialisations that look at the training data, with the adapter disabled and the model in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from peftcli.core.inject import disabled
from peftcli.core.layer import adapter_layers, bare, path_in_file
from peftcli.core.linear import dense_weight
from peftcli.core.quantised import is_quantised
from peftcli.errors import AdapterError
from peftcli.methods.lora.config import LoraConfig
from peftcli.methods.lora.eva import eva_directions, start_eva
from peftcli.methods.lora.init import loftq
from peftcli.methods.lora.layers import LoraLayer, LoraLinear
from peftcli.methods.lora.residual_init import StartedLinear
from peftcli.methods.lora.statistics import Batches, covariances, gradients

CORDA_EXAMPLES = 256
"""As many as the paper takes."""
LORA_GA_EXAMPLES = 64
"""As many as the paper's code takes."""
_KEY = "init_lora_weights"


def calibrate(model: nn.Module, config: LoraConfig, batches: Batches, adapter: str | None = None) -> None:
    """Start the model's LoRA layers from what the training data says, as ``config.init_lora_weights`` wants it.

    Raises:
        AdapterError: the data do not suffice, or do not reach a layer.
    """
    layers = lora_layers(model, adapter)
    if config.init_lora_weights == "eva":
        start_eva(model, config, layers, eva_directions(model, config, layers, batches))
        return
    modules: dict[str, nn.Module] = {name: layer for name, layer in layers.items() if isinstance(layer, StartedLinear)}
    with disabled(model):
        if config.init_lora_weights == "corda":
            found = covariances(model, modules, lambda: _forward(model, _first(batches, CORDA_EXAMPLES)))
        else:
            found = gradients(model, modules, lambda: _backward(model, _first(batches, LORA_GA_EXAMPLES)))
    for name, layer in layers.items():
        if isinstance(layer, StartedLinear):
            layer.begin(found[name], config)


@torch.no_grad()
def start_loftq(
    model: nn.Module,
    weight: Callable[[str], torch.Tensor],
    adapter: str | None = None,
    keep: Callable[[str], bool] = lambda name: True,
) -> None:
    """Start the LoRA layers over quantised layers from what quantisation took away of their weights.

    Args:
        model: the model, quantised.
        weight: gives the base weight of that name as it was before.
        adapter: name of the adapter, of several.
        keep: is told each layer that was started; where it says no, the layer is as it was.

    Raises:
        AdapterError: no layer is quantised, or a weight is of another shape.
    """
    layers = {
        name: layer
        for name, layer in lora_layers(model, adapter).items()
        if isinstance(layer, LoraLinear) and is_quantised(bare(layer))
    }
    if not layers:
        raise AdapterError("loftq makes up for the error of a quantised base model, and this one is not", key=_KEY)
    for name, layer in layers.items():
        quantised = dense_weight(layer.base_layer)
        original = weight(f"{name}.weight").to(quantised)
        if getattr(bare(layer), "source_cls", nn.Linear).__name__ == "Conv1D":  # bitsandbytes turns it round
            original = original.T
        if original.shape != quantised.shape:
            shapes = f"{tuple(original.shape)}, the model needs {tuple(quantised.shape)}"
            raise AdapterError(f"the base weight of {name} is {shapes}", key=_KEY)
        own = (layer.lora_A.weight, layer.lora_B.weight)
        before = [value.clone() for value in own]
        for value, new in zip(own, loftq(original, quantised, layer.r, layer.scaling), strict=True):
            value.copy_(new)
        if not keep(name):
            for value, old in zip(own, before, strict=True):
                value.copy_(old)


def lora_layers(model: nn.Module, adapter: str | None = None) -> dict[str, LoraLayer]:
    """The LoRA layers of the model's adapter, or of several the one of that name, by what they adapt."""
    found = {path: layer for path, layer in adapter_layers(model, adapter).items() if isinstance(layer, LoraLayer)}
    if len({layer.adapter for layer in found.values()}) > 1:
        raise AdapterError("the model holds several adapters; name one", key=_KEY)
    return {path_in_file(model, path): layer for path, layer in found.items()}


def _first(batches: Batches, examples: int) -> Iterator[Mapping[str, torch.Tensor]]:
    """So many batches that there are ``examples`` in them."""
    for batch in batches:
        if examples <= 0:
            return
        examples -= len(next(iter(batch.values())))
        yield batch


def _forward(model: nn.Module, batches: Batches) -> None:
    for batch in batches:
        model(**batch)


def _backward(model: nn.Module, batches: Batches) -> None:
    for batch in batches:
        model(**batch).loss.backward()
