"""Combine LoRA adapters into one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from peftcli.core.config import TARGETING
from peftcli.core.layer import adapter_dtype
from peftcli.core.targets import module_matches
from peftcli.errors import AdapterError
from peftcli.methods.combinations import Adapter, Combination, Combined, check_alike, replaced
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.updates import PairNames, pairs, updates
from peftcli.methods.updates import Update, distance, weighted_sum

_SAME = (
    "alora_invocation_tokens",
    "layer_replication",
    "trainable_token_indices",
    "ensure_weight_tying",
    "modules_to_save",
    "bias",
)
"""Settings that the adapters must share."""


def combine(adapters: Sequence[Adapter], weights: Sequence[float], how: Combination) -> Combined:
    """Combine LoRA adapters into one, each times its weight.

    Its lora_alpha is its r, so that B A is the update. Values that replace the base model's, of modules_to_save and
    trained biases, are averaged, which is the weighted sum of their changes where the weights add up to 1.
    """
    how.check()
    configs = [_lora(adapter) for adapter in adapters]
    check_alike(adapters, weights, _SAME)
    given = [_updates_of(adapter, config) for adapter, config in zip(adapters, configs, strict=True)]
    names = {path: pair for adapter in adapters for path, pair in pairs(adapter.tensors).items()}
    known = {tensor for pair in names.values() for tensor in (pair.a, pair.b, pair.bias)}
    tensors = replaced(adapters, weights, known) | _biases(adapters, weights, given, names)
    made, exact, largest_r = {}, {}, max(update.r for own in given for update in own.values())
    for path in names:
        parts = [(weight, own[path]) for weight, own in zip(weights, given, strict=True) if path in own]
        shapes = {update.shape: None for _, update in parts}
        if len(shapes) > 1:
            said = " and ".join(f"{rows} x {columns}" for rows, columns in shapes)
            raise AdapterError(f"{path} is of other sizes in other adapters: {said}")
        made[path] = how.combined(parts, path, largest_r)
        exact[path] = weighted_sum(parts)
        tensors |= _as_pair(adapters, names[path], made[path])
    errors = {path: 0.0 if how.method == "cat" else distance(made[path], exact[path]) for path in names}
    sizes = {path: exact[path].norm() for path in names}
    sizes_of_r = {path.partition(".base_layer")[0]: update.r for path, update in made.items()}
    return Combined(
        config=_config(configs, sizes_of_r, any(pair.bias in tensors for pair in names.values())),
        tensors=tensors,
        errors={path: _ratio(error, sizes[path]) for path, error in errors.items()},
        error=_ratio(math.hypot(*errors.values()), math.hypot(*sizes.values())),
    )


def _lora(adapter: Adapter) -> LoraConfig:
    config = adapter.config
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"{adapter.name} is {config.peft_type}; only LoRA adapters can be combined")
    if (variant := config.variant_key) not in (None, "alora_invocation_tokens"):
        raise AdapterError(f"{adapter.name} is a variant of LoRA that cannot be combined", key=variant)
    if config.target_parameters:
        raise AdapterError(
            f"{adapter.name} adapts parameters without layers, which cannot be combined", key="target_parameters"
        )
    return config


def _updates_of(adapter: Adapter, config: LoraConfig) -> dict[str, Update]:
    """Return the adapter's updates in float32 or wider; errors name the adapter."""
    wide = {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in adapter.tensors.items()}
    try:
        found = updates(config, wide)
    except AdapterError as error:
        raise AdapterError(f"{adapter.name} cannot be combined: {error.message}", key=error.key) from None
    for path, pair in pairs(wide).items():
        if wide[pair.b].shape[1] != found[path].r:
            raise AdapterError(f"{adapter.name} cannot be combined: {path} is a convolution with groups")
    return found


def _as_pair(adapters: Sequence[Adapter], pair: PairNames, update: Update) -> dict[str, torch.Tensor]:
    """Return the update as A and B in the shapes of the files."""
    like = next(adapter.tensors for adapter in adapters if pair.a in adapter.tensors)
    dtype = adapter_dtype(like[pair.a])
    left, right = update.left.to(dtype), update.right.to(dtype)
    return {pair.a: right.view(-1, *like[pair.a].shape[1:]), pair.b: left.view(*left.shape, *like[pair.b].shape[2:])}


def _biases(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    given: Sequence[dict[str, Update]],
    names: Mapping[str, PairNames],
) -> dict[str, torch.Tensor]:
    """Return the weighted sums of the biases of B, if any adapter has one."""
    if not any(pair.bias in adapter.tensors for pair in names.values() for adapter in adapters):
        return {}
    found = {}
    for path, pair in names.items():
        left = next(own[path].left for own in given if path in own)
        found[pair.bias] = left.new_zeros(left.shape[0], dtype=torch.float32)
        for adapter, weight, own in zip(adapters, weights, given, strict=True):
            if pair.bias in adapter.tensors:
                found[pair.bias] += weight * own[path].scaling * adapter.tensors[pair.bias].float()
    return found


def _config(configs: Sequence[LoraConfig], sizes: Mapping[str, int], biased: bool) -> LoraConfig:
    r = max(sizes.values(), key=list(sizes.values()).count)
    pattern = _pattern(sizes, r)
    nothing: Any = {}
    if any(getattr(config, key) != getattr(configs[0], key) for config in configs for key in TARGETING):
        nothing = {**dict.fromkeys(TARGETING), "target_modules": _named(configs, sizes)}
    return replace(
        configs[0].plain(),
        r=r,
        lora_alpha=r,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        use_rslora=False,
        lora_bias=biased,
        fan_in_fan_out=any(config.fan_in_fan_out for config in configs),
        base_model_name_or_path=next((c.base_model_name_or_path for c in configs if c.base_model_name_or_path), None),
        revision=next((config.revision for config in configs if config.revision), None),
        task_type=next((config.task_type for config in configs if config.task_type), None),
        **nothing,
    )


def _named(configs: Sequence[LoraConfig], paths: Iterable[str]) -> list[str]:
    """Return target_modules that match the modules that any of the adapters adapts, and no others."""
    lists = [config.target_modules for config in configs if not isinstance(config.target_modules, (str, type(None)))]
    narrowed = any(getattr(config, key) is not None for config in configs for key in TARGETING[1:])
    if len(lists) < len(configs) or narrowed:
        return sorted(paths)
    return sorted({name for each in lists for name in each})


def _pattern(sizes: Mapping[str, int], r: int) -> dict[str, int]:
    """Return the rank_pattern of the modules with another r, by the shortest name endings that match no others."""
    pattern: dict[str, int] = {}
    for path, own in sizes.items():
        parts = path.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        if own != r:
            pattern[next(e for e in endings if all(s == own for p, s in sizes.items() if module_matches(p, e)))] = own
    return pattern


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float(part > 0)
