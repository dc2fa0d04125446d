"""The layers of (IA)^3 (https://arxiv.org/abs/2205.05638), and how its adapters are combined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer, base_module
from peftcli.core.linear import CONVOLUTIONS
from peftcli.core.targets import find_modules, find_targets, model_type, module_matches, shortest_names
from peftcli.errors import AdapterError
from peftcli.methods._delta import factory_kwargs, require_linear
from peftcli.methods._families import IA3_INPUTS
from peftcli.methods.combinations import Adapter, Combination, Combined, check_alike, replaced
from peftcli.methods.ia3 import IA3Config


class IA3Layer(AdapterLayer):
    """``y = l * (W x + b)``, or ``y = W (l * x) + b`` for a feedforward module; ``l`` starts at one."""

    def __init__(self, module: nn.Module, shape: tuple[int, ...], feedforward: bool, config: IA3Config):
        super().__init__(module)
        self.feedforward = feedforward
        start = torch.ones if config.init_ia3_weights else torch.randn
        self.ia3_l = nn.Parameter(start(*shape, **factory_kwargs(self)))

    def factors(self) -> torch.Tensor:
        """``l`` as it goes with an input or an output."""
        return self.ia3_l

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.enabled:
            return self.base_layer(x, *args, **kwargs)
        if self.feedforward:
            return self.base_layer((x * self.factors()).to(x.dtype), *args, **kwargs)
        y: torch.Tensor = self.base_layer(x, *args, **kwargs)
        return (y * self.factors()).to(y.dtype)

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        merged = {"weight": base["weight"] * self.weight_factors()}
        if not self.feedforward and "bias" in base:
            merged["bias"] = base["bias"] * self.ia3_l.flatten()
        return merged

    def weight_factors(self) -> torch.Tensor:
        """``l`` as it goes with the base weight."""
        raise NotImplementedError


class IA3Linear(IA3Layer):
    """(IA)^3 over a linear layer: ``l`` is (out, 1), or (1, in) for a feedforward module."""

    def __init__(self, module: nn.Module, name: str, feedforward: bool, config: IA3Config):
        view = require_linear(module, name, "(IA)^3", "linear layers and convolutions")
        super().__init__(module, (1, view.in_features) if feedforward else (view.out_features, 1), feedforward, config)
        self.view = view

    def factors(self) -> torch.Tensor:
        return self.ia3_l.flatten()

    def weight_factors(self) -> torch.Tensor:
        return self.view.as_stored(self.ia3_l)


class IA3Conv(IA3Layer):
    """(IA)^3 over a convolution: ``l`` is (1, channels, 1...)."""

    def __init__(self, module: nn.Module, feedforward: bool, config: IA3Config):
        base = base_module(module)
        channels = base.in_channels if feedforward else base.out_channels
        super().__init__(module, (1, channels, *[1] * len(base.kernel_size)), feedforward, config)

    def weight_factors(self) -> torch.Tensor:
        base = base_module(self)
        if not self.feedforward:
            return self.ia3_l.transpose(0, 1)
        by_group = self.ia3_l.unflatten(1, (base.groups, -1))[0]  # each group of outputs sees its own inputs
        return by_group.repeat_interleave(base.out_channels // base.groups, 0)


def wrap(module: nn.Module, name: str, config: IA3Config) -> AdapterLayer:
    """The (IA)^3 layer over ``module``.

    Raises:
        AdapterError: the module is of a kind that (IA)^3 does not adapt.
    """
    feedforward = any(module_matches(name, entry) for entry in config.feedforward_modules or ())
    if isinstance(base_module(module), CONVOLUTIONS):
        return IA3Conv(module, feedforward, config)
    return IA3Linear(module, name, feedforward, config)


def targets(model: nn.Module, config: IA3Config) -> list[str]:
    """Return the names of the target modules; the config then says which of them have their inputs scaled."""
    names, entries = find_targets(model, config), config.feedforward_modules
    if entries is None:
        usual = IA3_INPUTS.get(model_type(model), [])
        found = [name for name in names if any(module_matches(name, entry) for entry in usual)]
        config.feedforward_modules = shortest_names(model, found)
    elif isinstance(entries, str):
        inside = replace(config, target_modules=entries, feedforward_modules=None, exclude_modules=None)
        found = find_targets(model, inside)
        config.feedforward_modules = shortest_names(model, [name for name in found if name in names])
    elif not config.inference_mode:  # a file's may name what the model lacks: its tensors say what was adapted
        find_modules(model, entries, "feedforward_modules")
    return names


def attach(model: nn.Module, config: IA3Config, layers: Mapping[str, AdapterLayer]) -> None:
    """Name the feedforward modules among the targets too: PEFT reads no file in which one is not part of the other."""
    wanted, inside = config.target_modules, config.feedforward_modules
    if not isinstance(wanted, str) and not isinstance(inside, str):
        config.target_modules = sorted({*(wanted or ()), *(inside or ())})


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
