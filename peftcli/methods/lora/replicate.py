"""Build a deeper model from a model's own layers; the copies share their base weights."""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import nn

from peftcli.core.inject import on_unload
from peftcli.core.layer import adapter_layers
from peftcli.errors import AdapterError

_KEY = "layer_replication"
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")
"""Keys of a model's config that hold a list with one entry per layer."""

_NUMBERS = {"layer_idx", "layer_id"}
"""Attributes of modules that hold the index of their layer in the cache."""


def replicate(model: Any, ranges: list[list[int]]) -> None:
    """Replace the model's layers by the layers ``start`` to ``end - 1`` of each range, one range after the other.

    Raises:
        AdapterError: the model has adapters, no single list of layers, fewer layers than the ranges name, or something
            for each layer that cannot be replicated with it.
    """
    if adapter_layers(model):
        raise AdapterError("the model holds an adapter already; replicate the layers of a plain one", key=_KEY)
    name, layers = _layer_list(model)
    order = [index for start, end in ranges for index in range(start, end)]
    if max(order) >= len(layers):
        raise AdapterError(f"{name} has the layers 0 to {len(layers) - 1}, not {max(order)}", key=_KEY)
    parent, _, leaf = name.rpartition(".")
    owner, config = model.get_submodule(parent), model.config.get_text_config()
    before = {key: getattr(config, key) for key in _PER_LAYER if isinstance(getattr(config, key, None), list)}
    kind = type(model).__name__
    for key in before:
        if isinstance(own := getattr(type(config), key, None), property) and own.fset is None:
            raise AdapterError(f"{kind} computes {key} from other settings, so its layers stay as they are", key=_KEY)
    if getattr(config, "hidden_size_per_layer_input", 0):
        raise AdapterError(f"{kind} has embeddings for each of its layers, so these stay as they are", key=_KEY)
    after = {key: [values[index] for index in order] for key, values in before.items()}
    on_unload(model, functools.partial(_settle, owner, leaf, layers, config, before))
    _settle(owner, leaf, nn.ModuleList(_numbered(layers[i], place) for place, i in enumerate(order)), config, after)


def separate(model: Any) -> None:
    """Give each layer its own tensors after a merge: a checkpoint cannot hold shared ones."""
    seen: set[int] = set()
    for module in _layer_list(model)[1].modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in tables:
            for name, value in tensors.items():
                if id(value) in seen:
                    tensors[name] = copy.deepcopy(value)
                seen.add(id(tensors[name]))


def _settle(owner: nn.Module, leaf: str, layers: nn.ModuleList, config: Any, per_layer: dict[str, list[Any]]) -> None:
    setattr(owner, leaf, layers)
    config.num_hidden_layers = len(layers)
    for key, values in per_layer.items():
        setattr(config, key, values)


def _layer_list(model: Any) -> tuple[str, nn.ModuleList]:
    """Return name and list of the model's transformer layers."""
    config: Any = getattr(model, "config", None)
    count = getattr(config.get_text_config(), "num_hidden_layers", 0) if config else 0
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    if len(found) != 1 or config.is_encoder_decoder:
        raise AdapterError(f"{type(model).__name__} has no single list of transformer layers", key=_KEY)
    return next(iter(found.items()))


def _numbered(layer: nn.Module, index: int) -> nn.Module:
    """Return a copy of a layer that shares its tensors and configs, with its own ``index`` in the cache."""
    shared = [*layer.parameters(), *layer.buffers(), *(getattr(module, "config", None) for module in layer.modules())]
    twin = copy.deepcopy(layer, {id(value): value for value in shared})
    for module in twin.modules():
        for name in _NUMBERS.intersection(vars(module)):
            setattr(module, name, index)
    return twin
