"""Replace the weights of a LoRA adapter by those of another one, in place, so that a compiled model stays compiled.

The parameters stay the same objects, and so does the factor alpha / r, a constant of compiled code: the new B is
multiplied by the ratio of the two factors. An adapter of a smaller r fills its part of A and B, and zeros the rest.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftcli.core.config import TARGETING, AdapterConfig
from peftcli.core.files import read_tensors
from peftcli.core.layer import adapter_layers, base_module, base_name
from peftcli.core.targets import as_pattern
from peftcli.core.weights import check_finite, file_tensors, holds_its_file
from peftcli.errors import AdapterError
from peftcli.guard.files import short_name
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.initialisations import SECTIONS
from peftcli.methods.lora.lora import LoraConv, LoraEmbedding, LoraLayer, LoraLinear, size_of
from peftcli.peft_api.adding import find_by_options
from peftcli.peft_api.tuner import find_tuner

_PREFIX = LoraConfig.file_prefix
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
"""Settings that do not matter, or that ``_swap`` follows. What they say of tensors is checked by the tensors."""


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: str | None = None,
    **options: Any,
) -> None:
    """Put the LoRA adapter of a folder or hub repository in the place of one of the model's, under its name.

    The adapter may have another r and lora_alpha, and fewer modules. In a compiled model its r must not be above that
    of the adapter that it replaces: ``prepare_model_for_compiled_hotswap``. The weights go where the old ones are,
    whatever ``torch_device`` is. The new update counts in full, whatever scale was set on the old one's layers.
    ``options`` are those of ``load_adapter``.

    Raises:
        AdapterError: the new adapter cannot be read or does not fit, or the old one is merged. Nothing is changed then.
    """
    tuner, place = find_tuner(model)
    if tuner is None:
        raise AdapterError(f"needs a PeftModel, not a {type(place).__name__}", hint="hotswap_adapter_from_state_dict")
    tuner.check_known([adapter_name])
    source = find_by_options(model_name_or_path, options)
    check_hotswap_configs_compatible(tuner.peft_config[adapter_name], source.config)
    hotswap_adapter_from_state_dict(model, read_tensors(source.folder), adapter_name, _lora(source.config))


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Put the tensors of a LoRA adapter in the place of one, also in a plain model. The config says how strong it is.

    The tensors have the names of the adapter file, or PEFT's: with the adapter's name before ``.weight``, and for plain
    models without ``base_model.model.``. There is no ``parameter_prefix`` but PEFT's.

    Raises:
        AdapterError: the tensors do not fit, or the old adapter is merged. Nothing is changed then.
    """
    tuner, place = find_tuner(model)
    configs = []
    if tuner is not None:
        if adapter_name in tuner.merged_adapters:
            raise AdapterError(f"{adapter_name} is merged; call unmerge_adapter() first", key="adapter_name")
        configs = [_lora(tuner.peft_config[adapter_name])]
    own_name = re.compile(rf"(lora_\w+)\.{re.escape(adapter_name)}(?=(\.weight|\.bias)?$)")  # as PEFT's states have it
    plain = {name.removeprefix("_orig_mod.").removeprefix(_PREFIX): value for name, value in state_dict.items()}
    tensors = {_PREFIX + own_name.sub(r"\1", name): value for name, value in plain.items()}
    check_finite(tensors)
    _swap(place, adapter_name, config, tensors, *configs, may_widen=not _is_compiled(model))


def check_hotswap_configs_compatible(config0: AdapterConfig, config1: AdapterConfig) -> None:
    """Raise AdapterError if an adapter of one config cannot take the place of an adapter of the other."""
    old, new = _lora(config0), _lora(config1)
    for key in sorted({entry.name for entry in fields(old) if entry.metadata.get("file", True)} - _MAY_DIFFER):
        if (before := getattr(old, key)) != (after := getattr(new, key)):
            raise AdapterError(f"the adapters differ: {before!r} and {after!r}", key=key)


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, AdapterConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Give the LoRA adapters of a model the largest r of those that will take their place, before it is compiled.

    What the model computes stays. Without ``target_rank`` there is nothing to do.

    Args:
        model: a model with an adapter.
        target_rank: the r. None: what it is.
        config: configs that are changed to say the same: one, or by the names of the adapters. Those of a model of
            ``get_peft_model`` are changed in any case.
        check_compiled: what a model that is compiled already is: ``error``, ``warn``, or nothing (``ignore``).

    Raises:
        AdapterError: the model is compiled already, has no LoRA layer, or one of a larger r.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise AdapterError(f"must be error, warn or ignore, not {check_compiled!r}", key="check_compiled")
    if _is_compiled(model) and check_compiled != "ignore":
        if check_compiled == "error":
            raise AdapterError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        warnings.warn(
            "prepare_model_for_compiled_hotswap was called with a model that is already compiled, "
            "and will be compiled again",
            stacklevel=2,
        )
    tuner, place = find_tuner(model)
    known = tuner.peft_config if tuner else {}
    layers = [layer for layer in adapter_layers(place).values() if isinstance(layer, LoraLayer)]
    adapters = list(dict.fromkeys(layer.adapter for layer in layers))
    if not adapters:
        raise AdapterError("No adapter layers found on the model; load the first LoRA adapter before")
    if target_rank is None:
        return
    for name in adapters:
        given = config.get(name) if isinstance(config, Mapping) else config
        configs = {id(each): _lora(each) for each in (known.get(name), given) if each is not None}
        _widen(place, name, target_rank, *configs.values())


def _is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def _lora(config: AdapterConfig) -> LoraConfig:
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"hot-swapping works for LORA, not {config.peft_type}", key="peft_type")
    return config


def _widen(model: nn.Module, adapter: str, r: int, *configs: LoraConfig) -> None:
    """Give all layers of an adapter the same r, a larger one. What they compute stays; their parameters are new ones.

    Its ``configs`` are changed to say the same.
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


def _swap(
    model: nn.Module,
    adapter: str,
    new: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    *configs: LoraConfig,
    may_widen: bool = True,
) -> None:
    """Copy ``tensors``, by the names of the adapter file, over those of an adapter; those that they lack become 0.

    ``new`` is their config. If their r is larger and the layers ``may_widen``, these get it, and the adapter's
    ``configs`` are changed to say so. Scales that were set on the layers are reset, as PEFT does.
    """
    if not holds_its_file(model, adapter):
        raise AdapterError("what this adapter trains is not what its file holds; load it from its folder first")
    names = {layer: base_name(model, path) for path, layer in _layers(model, adapter).items()}
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
        shape = list(place.shape)
        if tensor in _R and type(layer) in _WIDENED:
            groups, dimension, size = _groups(layer), _R[tensor], r or layer.r
            shape[dimension] = size // (groups if dimension else 1)
            if value.ndim == len(shape) and value.shape[dimension] < shape[dimension]:
                value = _pad(value, dimension, size, groups)
        values[name] = value
        if list(value.shape) != shape:
            wrong.append(f"shape: {name} is {tuple(tensors[name].shape)}, the model has {tuple(place.shape)}")
    if wrong:
        raise AdapterError("\n  ".join(["the adapter cannot take the place of this one:", *wrong[:8]]))
    if r:
        _widen(model, adapter, r, *configs)
    with torch.no_grad():
        for name, (_, _, place) in file_tensors(model, adapter).items():
            place.copy_(values[name]) if name in values else place.zero_()
    for layer in names:
        layer.scaling = layer.full_scaling


def _layers(model: nn.Module, adapter: str) -> dict[str, LoraLayer]:
    return {path: layer for path, layer in adapter_layers(model, adapter).items() if isinstance(layer, LoraLayer)}


def _groups(layer: LoraLayer) -> int:
    return getattr(base_module(layer), "groups", 1)


def _pad(value: torch.Tensor, dimension: int, r: int, groups: int) -> torch.Tensor:
    """Return A or B with zeros up to ``r``. Of a convolution with groups each has its part of the rows of A."""
    if dimension == 1:
        return torch.cat([value, value.new_zeros(len(value), r // groups - value.shape[1], *value.shape[2:])], dim=1)
    parts = value.unflatten(0, (groups, -1))
    more = value.new_zeros(groups, r // groups - parts.shape[1], *value.shape[1:])
    return torch.cat([parts, more], dim=1).flatten(0, 1)
