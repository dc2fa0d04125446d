"""Combine (IA)^3 adapters into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from peftcli.errors import AdapterError
from peftcli.methods.combinations import Adapter, Combination, Combined, check_alike, replaced
from peftcli.methods.ia3 import IA3Config

_SAME = ("modules_to_save", "exclude_modules")


def combine(adapters: Sequence[Adapter], weights: Sequence[float], how: Combination) -> Combined:
    """Return the weighted sum of the factors; a module that an adapter leaves alone has the factor 1 there."""
    if how.method not in ("cat", "linear"):
        raise AdapterError(f"(IA)^3 has no matrices, so {how.method} means nothing", key="combination_type")
    how.check()
    check_alike(adapters, weights, _SAME)
    names = sorted({name for adapter in adapters for name in adapter.tensors if name.endswith(".ia3_l")})
    tensors = replaced(adapters, weights, names)
    for name in names:
        there = [adapter.tensors[name].float() for adapter in adapters if name in adapter.tensors]
        if any(value.shape != there[0].shape for value in there):
            raise AdapterError(f"{name} scales inputs in one adapter and outputs in another")
        one = torch.ones_like(there[0])
        tensors[name] = torch.stack(
            [weight * adapter.tensors.get(name, one) for adapter, weight in zip(adapters, weights, strict=True)]
        ).sum(0)
    configs = [adapter.config for adapter in adapters if isinstance(adapter.config, IA3Config)]
    config = replace(
        configs[0],
        target_modules=_union([config.target_modules for config in configs], "target_modules"),
        feedforward_modules=_union([config.feedforward_modules for config in configs], "feedforward_modules"),
    )
    return Combined(config, tensors, errors=dict.fromkeys(names, 0.0), error=0.0)


def _union(wanted: Sequence[list[str] | str | None], key: str) -> list[str] | str:
    """Return what matches where any of these does: lists of names, or patterns."""
    if all(isinstance(each, str) for each in wanted):
        return "|".join(dict.fromkeys(f"({each})" for each in wanted))
    if any(isinstance(each, str) for each in wanted):
        raise AdapterError("is a pattern in one adapter and a list in another", key=key)
    return sorted({name for each in wanted for name in each or ()})
