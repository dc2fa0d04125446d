"""Fold an adapter into its base model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.inject import free_statistics, keep_shape, replace_modules
from peftcli.core.layer import (
    AdapterLayer,
    WeightChange,
    adapter_layers,
    base_module,
    layers_at,
    model_ends,
    modules_sharing,
    plain_dtype,
)
from peftcli.core.protocols import layers_of
from peftcli.core.quantised import as_before_quantising, dense_layer, is_quantised
from peftcli.errors import AdapterError


def merge(model: nn.Module, *configs: AdapterConfig, dequantise: bool = False) -> bool:
    """Fold the model's enabled adapters into its weights, in place. No adapter layer is left.

    Sums are computed in float32 or wider. An adapted embedding or head that shares its weight with the
    other one gets a weight of its own, as do all other modules that share it then.

    Args:
        model: the model, with adapters in it.
        configs: those of the enabled adapters.
        dequantise: convert quantised layers into ordinary ones. Otherwise they cannot be merged into.

    Returns:
        Whether input and output embeddings shared a weight before and do not now.

    Raises:
        AdapterError: a method cannot be merged, a layer below it is quantised, or a merged weight is not finite. The
            model is not changed then.
    """
    for config in configs:
        if reason := config.merge_problem():
            raise AdapterError(reason)
    tied = _tied(model)
    quantised = [module for module in model.modules() if is_quantised(module)] if dequantise else []
    dtype = plain_dtype(model)
    dense = {module: dense_layer(module, dtype) for module in quantised}
    replace_modules(model, dense)
    try:
        folded = fold(model)
    except AdapterError:
        replace_modules(model, {new: old for old, new in dense.items()})
        raise
    _keep_parameters(model, folded)
    replace_modules(model, {layer: base_module(layer) for layer in outermost(model).values()})
    replace_modules(model, {new: as_before_quantising(new, old) for old, new in dense.items()})
    keep_shape(model)
    free_statistics(model)
    for config in configs:
        layers_of(config).after_merge(model, config)
    untied = tied and not _tied(model)
    if untied:  # of modules that share the weight of one end, a checkpoint would hold one alone
        for end in model_ends(model):
            for module in modules_sharing(model, end).values():
                module.weight = nn.Parameter(end.weight.detach().clone(), end.weight.requires_grad)
    return untied


def merge_layer_by_layer(model: nn.Module) -> None:
    """Fold the model's enabled adapters into its weights, in place, with memory for the weights of one layer more.

    Unlike ``merge`` it keeps no weight to go back to: after an error the model is of no use.

    Raises:
        AdapterError: a layer cannot be merged, or a merged weight is not finite.
    """
    holders = Counter(map(id, (weight for _, weight in model.named_parameters(remove_duplicate=False))))
    for module, leaf, before, value in _changes(model):
        if holders[id(before)] == 1:
            before.data.copy_(value)  # where it is: the pages of a file that is mapped would stay in memory
        else:
            setattr(module, leaf, value)
    replace_modules(model, {layer: base_module(layer) for layer in outermost(model).values()})


@dataclass(frozen=True)
class Folded:
    """Weights with their adapters' updates folded in, and the way back."""

    before: list[tuple[nn.Module, str, torch.Tensor]]
    """Where each weight or buffer stood: module, name, and what it was."""
    layers: list[AdapterLayer]
    """The layers that were enabled."""

    def undo(self) -> None:
        """Put the weights back, exactly, and enable the layers."""
        for change in reversed(self.before):
            put_back(*change)
        for layer in self.layers:
            layer.enabled, layer.merged_adapters = True, []


def fold(model: nn.Module) -> Folded:
    """Put the enabled adapters' updates into the base weights and disable their layers, which stay in place.

    Raises:
        AdapterError: a layer cannot be merged, or a merged weight is not finite. The model is as it was then.
    """
    done = Folded([], [layer for layer in adapter_layers(model).values() if layer.enabled])
    kept: dict[torch.Tensor, torch.Tensor] = {}
    try:
        for module, leaf, before, value in _changes(model):
            first = kept.setdefault(before, value)
            merged = first if torch.equal(first, value) else value  # shared and changed alike: still shared
            done.before.append((module, leaf, before))
            setattr(module, leaf, merged)
    except AdapterError:
        done.undo()
        raise
    for layer in done.layers:
        layer.enabled, layer.merged_adapters = False, [layer.adapter]
    return done


def put_back(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Set a weight or buffer of a module to what it was, in the dtype and on the device of what is there by now."""
    there = getattr(module, name)
    if tensor.is_meta == there.is_meta:  # else there is no value to put back
        tensor.data = tensor.data.to(there)
        setattr(module, name, tensor)


def _changes(model: nn.Module) -> Iterator[WeightChange]:
    """Yield what the enabled adapters change; a bias also in a module around its layer that holds it, as in BERT."""
    around = [module for module in model.modules() if module._modules and "bias" in module._parameters]
    for name, layer in outermost(model).items():
        changes = layer.folded_weights(name)
        yield from changes
        if [leaf for _, leaf, _, _ in changes] == ["bias"]:  # or the weight is untied, and saving would drop the bias
            _, leaf, before, value = changes[0]
            yield from ((module, leaf, before, value) for module in around if module._parameters["bias"] is before)


def _keep_parameters(model: nn.Module, folded: Folded) -> None:
    """Put the merged values into the parameters that were there, which others may hold, where the values are one.

    A parameter that is still in the model was shared with a module that is not merged, and keeps its value.
    """
    shared: set[torch.Tensor] = {*model.parameters()}
    merged: dict[torch.Tensor, torch.Tensor] = {}
    for module, name, before in folded.before:
        value = getattr(module, name)
        if merged.setdefault(before, value) is not value:
            shared.add(before)
    for module, name, before in folded.before:
        if isinstance(before, nn.Parameter) and before not in shared:
            before.data = merged[before].data
            setattr(module, name, before.requires_grad_(False))


def outermost(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return the adapter layers by path, of several on one module the outermost."""
    layers = adapter_layers(model)
    below = {inner for layer in layers.values() for inner in layers_at(layer)[1:]}
    return {path: layer for path, layer in layers.items() if layer not in below}


def _tied(model: nn.Module) -> bool:
    first, last = (end and getattr(base_module(end), "weight", None) for end in model_ends(model))
    return first is not None and first is last
