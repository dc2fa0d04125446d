"""Merge adapters into the weights of their base model: layer by layer, for good or until it is undone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.inject import free_statistics, keep_shape, replace_modules
from peftcli.core.layer import (
    AdapterLayer,
    adapter_layers,
    base_module,
    check_not_offloaded,
    layers_at,
    model_ends,
    modules_sharing,
    plain_dtype,
)
from peftcli.core.protocols import layers_of
from peftcli.core.quantised import as_before_quantising, dense_layer, is_quantised
from peftcli.errors import AdapterError


class WeightChange(NamedTuple):
    """A weight or buffer that merging replaces."""

    module: nn.Module
    name: str
    """Its name in the module."""
    before: torch.Tensor
    after: torch.Tensor

    def undo(self) -> None:
        """Put back what was there, in the dtype and on the device of what is there by now."""
        there = getattr(self.module, self.name)
        if self.before.is_meta == there.is_meta:  # else there is no value to put back
            self.before.data = self.before.data.to(there)
            setattr(self.module, self.name, self.before)


@dataclass(frozen=True)
class MergedWeights:
    """Weights with the updates of enabled adapters in them, until ``undo``."""

    changes: list[WeightChange]
    layers: list[AdapterLayer]
    """The layers that were enabled."""

    def undo(self) -> None:
        """Put the weights back, exactly, and enable the layers."""
        for change in reversed(self.changes):
            change.undo()
        for layer in self.layers:
            layer.enabled, layer.merged_adapters = True, []


def merge(model: nn.Module, *configs: AdapterConfig, dequantise: bool = False) -> bool:
    """Merge the model's enabled adapters into its weights, in place. No adapter layer is left.

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
        merged = merge_in_place(model)
    except AdapterError:
        replace_modules(model, {new: old for old, new in dense.items()})
        raise
    _keep_parameters(model, merged.changes)
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
    """Merge the model's enabled adapters into its weights, in place, with memory for the weights of one layer more.

    Unlike ``merge`` it keeps no weight to go back to: after an error the model is of no use.

    Raises:
        AdapterError: a layer cannot be merged, or a merged weight is not finite.
    """
    holders = Counter(map(id, (weight for _, weight in model.named_parameters(remove_duplicate=False))))
    for module, name, before, after in _changes(model):
        if holders[id(before)] == 1:
            before.data.copy_(after)  # where it is: the pages of a file that is mapped would stay in memory
        else:
            setattr(module, name, after)
    replace_modules(model, {layer: base_module(layer) for layer in outermost(model).values()})


def merge_in_place(model: nn.Module) -> MergedWeights:
    """Put the enabled adapters' updates into the base weights and disable their layers, which stay in place.

    ``model`` may also be an adapter layer, which is merged with those below it.

    Raises:
        AdapterError: a layer cannot be merged, or a merged weight is not finite. The model is as it was then.
    """
    done = MergedWeights([], [layer for layer in adapter_layers(model).values() if layer.enabled])
    first: dict[torch.Tensor, torch.Tensor] = {}
    try:
        for change in _changes(model):
            known = first.setdefault(change.before, change.after)
            after = (
                known if torch.equal(known, change.after) else change.after
            )  # shared and changed alike: still shared
            done.changes.append(change._replace(after=after))
            setattr(change.module, change.name, after)
    except AdapterError:
        done.undo()
        raise
    for layer in done.layers:
        layer.enabled, layer.merged_adapters = False, [layer.adapter]
    return done


def outermost(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return the adapter layers by path, of several on one module the outermost."""
    layers = adapter_layers(model)
    below = {inner for layer in layers.values() for inner in layers_at(layer)[1:]}
    return {path: layer for path, layer in layers.items() if layer not in below}


@contextmanager
def ready_to_merge(layer: AdapterLayer) -> Iterator[None]:
    """Hold the adapters on one module in evaluation mode inside, and their tensors in float32 or wider.

    Training leaves parts out at random, or adds noise, which must not stay in a merged weight. Merging a model that was
    cast to half precision needs more digits, and operations that have no half precision.
    """
    base = base_module(layer)
    foreign = {id(part) for part in (*base.modules(), *base.parameters(), *base.buffers())}
    training = [module for module in layer.modules() if module.training and id(module) not in foreign]
    own = [tensor for tensor in (*layer.parameters(), *layer.buffers()) if id(tensor) not in foreign]
    narrow = [(tensor, tensor.data) for tensor in own if tensor.dtype in (torch.float16, torch.bfloat16)]
    for module in training:
        module.training = False
    for tensor, value in narrow:
        tensor.data = value.float()
    try:
        with torch.no_grad():
            yield
    finally:
        for tensor, value in narrow:
            tensor.data = value
        for module in training:
            module.training = True


def _changes(model: nn.Module) -> Iterator[WeightChange]:
    """Yield what the enabled adapters change; a bias also in a module around its layer that holds it, as in BERT."""
    around = [module for module in model.modules() if module._modules and "bias" in module._parameters]
    for name, layer in outermost(model).items():
        changes = _changes_at(layer, name or type(base_module(layer)).__name__)
        yield from changes
        if [change.name for change in changes] == ["bias"]:  # or the weight is untied, and saving would drop the bias
            holders = (module for module in around if module._parameters["bias"] is changes[0].before)
            yield from (changes[0]._replace(module=module) for module in holders)


def _changes_at(layer: AdapterLayer, name: str) -> list[WeightChange]:
    """Return what the enabled layers on one module, called ``name``, change in it. Nothing is in place yet."""
    base = base_module(layer)
    if is_quantised(base):
        raise AdapterError(
            f"{name} is quantised, and rounding the merged weight again would lose much of what was learned",
            hint="merge into the full-precision base model, or ask for dequantize",
        )
    check_not_offloaded(base, name)
    tensors = {**dict(base.named_parameters(remove_duplicate=False)), **dict(base.named_buffers())}
    try:
        with ready_to_merge(layer):
            values = layer.folded(dict(tensors))
    except KeyError as error:
        if error.args != ("weight",) or not isinstance(getattr(base, "weight", None), torch.Tensor):
            raise
        raise AdapterError(
            f"{name} computes its weight from other tensors, as by pruning or a weight norm, and cannot be merged",
            hint="make the weight an ordinary one before the adapter is put in, by remove_parametrizations",
        ) from None
    made, changes = dict[torch.Tensor, torch.Tensor](), list[WeightChange]()
    for tensor, value in values.items():
        before = tensors[tensor]
        if before not in made:
            merged = value.detach().to(before.dtype)
            made[before] = nn.Parameter(merged, requires_grad=False) if isinstance(before, nn.Parameter) else merged
        if not torch.isfinite(made[before]).all():
            adapters = {each.adapter for each in layers_at(layer) if each.enabled}
            raise AdapterError(
                f"NaNs detected in the merged {'bias' if tensor.endswith('bias') else 'weights'}. The adapter "
                f"{' or '.join(sorted(adapters))} seems to be broken: {name}.{tensor} contains NaN or Inf"
            )
        owner, _, leaf = tensor.rpartition(".")
        changes.append(WeightChange(base.get_submodule(owner), leaf, before, made[before]))
    return changes


def _keep_parameters(model: nn.Module, changes: list[WeightChange]) -> None:
    """Put the merged values into the parameters that were there, which others may hold, where the values are one.

    A parameter that is still in the model was shared with a module that is not merged, and keeps its value.
    """
    shared: set[torch.Tensor] = {*model.parameters()}
    merged: dict[torch.Tensor, torch.Tensor] = {}
    for change in changes:
        if merged.setdefault(change.before, change.after) is not change.after:
            shared.add(change.before)
    for module, name, before, after in changes:
        if isinstance(before, nn.Parameter) and before not in shared:
            before.data = after.data
            setattr(module, name, before.requires_grad_(False))


def _tied(model: nn.Module) -> bool:
    first, last = (end and base_module(end)._parameters.get("weight") for end in model_ends(model))
    return first is not None and first is last
