"""Replace the weights of a LoRA adapter by those of another one, in place, so that a compiled model stays compiled.

The parameters stay the same objects, and so does the factor alpha / r, a constant of compiled code: the new B is
multiplied by the ratio of the two factors. An adapter of a smaller r fills its part of A and B, and zeros the rest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import nn

from peftcli.core.config import TARGETING
from peftcli.core.layer import adapter_layers, base_module, base_name
from peftcli.core.targets import as_pattern
from peftcli.core.weights import check_finite, file_tensors, holds_its_file
from peftcli.errors import AdapterError
from peftcli.guard.files import short_name
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.initialisations import SECTIONS
from peftcli.methods.lora.lora import LoraConv, LoraEmbedding, LoraLayer, LoraLinear, size_of

_R = {"lora_A.weight": 0, "lora_B.weight": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
"""Names of the tensors with a dimension of size r, and which one that is. In B of a convolution it is r / groups."""
_A = ("lora_A.weight", "lora_embedding_A")
_WIDENED = (LoraLinear, LoraConv, LoraEmbedding)
_SCALED = ("lora_B.weight", "lora_B.bias", "lora_embedding_B")
_MAY_DIFFER = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout"),
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "fan_in_fan_out"),
    *("peft_type", "peft_version", "init_lora_weights", *TARGETING, *SECTIONS.values()),
}
"""Settings that do not matter, or that ``swap`` follows. What they say of tensors is checked by the tensors."""


def check_same(old: LoraConfig, new: LoraConfig) -> None:
    """Raise AdapterError for settings that the layers were built with and that ``new`` has otherwise."""
    for key in sorted({entry.name for entry in fields(old) if entry.metadata.get("file", True)} - _MAY_DIFFER):
        if (before := getattr(old, key)) != (after := getattr(new, key)):
            raise AdapterError(f"the adapters differ: {before!r} and {after!r}", key=key)


def widen(model: nn.Module, adapter: str, r: int, *configs: LoraConfig) -> None:
    """Give all layers of an adapter the same r, a larger one. What they compute stays; their parameters are new ones.

    Its ``configs`` are changed to say the same.

    Raises:
        AdapterError: a layer has a larger r, or its r cannot be changed. Nothing is changed then.
    """
    layers = {base_name(model, path): layer for path, layer in _layers(model, adapter).items()}
    for name, layer in layers.items():
        if type(layer) not in _WIDENED:
            raise AdapterError(f"{name} is a {type(layer).__name__}, whose r cannot be changed", key="r")
        if layer.r > r or r % _groups(layer):
            larger = f"it is {layer.r} already" if layer.r > r else f"it must be a multiple of {_groups(layer)} groups"
            raise AdapterError(f"{name} cannot have {r}: {larger}", key="r")
    for layer in layers.values():
        for tensor, value in layer.own_tensors().items():
            if tensor in _R:
                owner, _, leaf = tensor.rpartition(".")
                padded = _pad(value.detach(), _R[tensor], r, _groups(layer))
                setattr(layer.get_submodule(owner), leaf, nn.Parameter(padded, value.requires_grad))
        layer.r = r
    for config in configs:
        size = math.sqrt(r) if config.use_rslora else r
        alphas = {name: layer.full_scaling * size for name, layer in layers.items()}
        config.r, config.rank_pattern = r, dict.fromkeys(config.rank_pattern, r)
        config.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
        config.alpha_pattern = as_pattern(alphas, config.lora_alpha)


def swap(
    model: nn.Module,
    adapter: str,
    new: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    *configs: LoraConfig,
    may_widen: bool = True,
) -> None:
    """Copy another adapter's tensors over those of an adapter. Modules that it does not adapt are adapted by nothing.

    The tensors, by the names of the adapter file, and the config ``new`` are the other one's. If its r is larger, and
    the layers ``may_widen``, they do, and ``configs``, those of the adapter, are changed to say it. Scales that were
    set on the layers are reset, as PEFT does.

    Raises:
        AdapterError: the tensors do not fit. Nothing is changed then.
    """
    check_finite(tensors)
    if not holds_its_file(model, adapter):
        raise AdapterError("what this adapter trains is not what its file holds; load it from its folder first")
    names = {layer: base_name(model, path) for path, layer in adapter_layers(model, adapter).items()}
    places = file_tensors(model, adapter)
    sizes = [
        (layer.r, len(tensors.get(name, ())))
        for name, (layer, tensor, _) in places.items()
        if tensor in _A and type(layer) in _WIDENED
    ]
    r = max(map(max, sizes)) if may_widen and any(new > old for old, new in sizes) else 0
    wrong = [f"unexpected: {short_name(name)}" for name in tensors if name not in places]
    values = {}
    for name, (layer, tensor, place) in places.items():
        if not isinstance(layer, LoraLayer) or name not in tensors:
            wrong += [] if tensor in (*_R, "lora_B.bias") else [f"not of LoRA, and other: {name}"]
            continue
        value = tensors[name].to(place.device, place.dtype)
        if tensor in _SCALED:
            value = value * (size_of(new, names[layer])[1] / layer.full_scaling)
        values[name], shape = _fill_up(value, tensor, list(place.shape), layer, r or layer.r)
        if list(values[name].shape) != shape:
            wrong.append(f"shape: {name} is {tuple(tensors[name].shape)}, the model has {tuple(place.shape)}")
    if wrong:
        raise AdapterError("\n  ".join(["the adapter cannot take the place of this one:", *wrong[:8]]))
    if r:
        widen(model, adapter, r, *configs)
    with torch.no_grad():
        for name, (_, _, place) in file_tensors(model, adapter).items():
            place.copy_(values[name]) if name in values else place.zero_()
    for layer in _layers(model, adapter).values():
        layer.scaling = layer.full_scaling


def _layers(model: nn.Module, adapter: str) -> dict[str, LoraLayer]:
    return {path: layer for path, layer in adapter_layers(model, adapter).items() if isinstance(layer, LoraLayer)}


def _groups(layer: LoraLayer) -> int:
    return getattr(base_module(layer), "groups", 1)


def _fill_up(
    value: torch.Tensor, tensor: str, shape: list[int], layer: LoraLayer, r: int
) -> tuple[torch.Tensor, list[int]]:
    """Return the value of a layer's tensor with zeros up to size r, and the shape that it must have then."""
    if tensor in _R and type(layer) in _WIDENED:
        groups, dimension = _groups(layer), _R[tensor]
        shape[dimension] = r // (groups if dimension else 1)
        if value.ndim == len(shape) and value.shape[dimension] < shape[dimension]:
            value = _pad(value, dimension, r, groups)
    return value, shape


def _pad(value: torch.Tensor, dimension: int, r: int, groups: int) -> torch.Tensor:
    """Return A or B with zeros up to ``r``. Of a convolution with groups each has its part of the rows of A."""
    if dimension == 1:
        return torch.cat([value, value.new_zeros(len(value), r // groups - value.shape[1], *value.shape[2:])], dim=1)
    parts = value.unflatten(0, (groups, -1))
    more = value.new_zeros(groups, r // groups - parts.shape[1], *value.shape[1:])
    return torch.cat([parts, more], dim=1).flatten(0, 1)
