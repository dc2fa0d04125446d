"""The layer of Lily (https://arxiv.org/abs/2407.09946), and how layers share their matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer
from peftcli.core.linear import linear_view
from peftcli.core.targets import find_targets, module_matches, shortest_names
from peftcli.methods._delta import draw_as_linear, factory_kwargs, require_linear
from peftcli.methods.lily import LilyConfig

_SHARED = ("lily_A.weight", "lily_B.weight")


class LilyLinear(AdapterLayer):
    """``y = W x + scaling * B A x``; ``B`` is a mixture of the matrices ``B_n: (out, r)`` that layers share.

    ``A: (r, in)`` is shared too. What of each ``B_n`` there is in the mixture is the softmax of ``router A x``,
    averaged over all positions of all rows: a row's result depends on the others of its batch, as in the paper's code.
    """

    def __init__(self, module: nn.Module, name: str, config: LilyConfig):
        view = require_linear(module, name, "Lily")
        super().__init__(module)
        like, r, count = factory_kwargs(module), config.r, config.num_B
        self.scaling, self.count = config.scaling, count
        self.lily_A = nn.Linear(view.in_features, r, bias=False, **like)
        self.lily_B = nn.Linear(view.out_features, count * r, bias=False, **like)
        self.lily_router = nn.Linear(r, count, bias=False, **like)
        draw_as_linear(self.lily_A.weight, self.lily_B.weight, self.lily_router.weight)
        if config.init_weights:
            nn.init.zeros_(self.lily_B.weight)
        self.borrowed: frozenset[str] = frozenset()
        """Tensors that train as an earlier layer's."""

    def own_tensors(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in super().own_tensors().items() if name not in self.borrowed}

    def file_tensors(self) -> dict[str, torch.Tensor]:
        return {**super().own_tensors()}  # every layer's file has the shared ones

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.lily_A(x.to(self.lily_A.weight.dtype))
        shares = self.lily_router(hidden).softmax(-1).flatten(0, -2).mean(0)
        mixed = torch.einsum("n,nro->ro", shares, self.lily_B.weight.unflatten(0, (self.count, -1)))
        return y + (self.scaling * hidden @ mixed).to(y.dtype)


def targets(model: nn.Module, config: LilyConfig) -> list[str]:
    """Return the names of the target modules; where they were not given, name their kinds: layers share by these."""
    names = find_targets(model, config)
    if config.target_modules in (None, "all-linear"):
        config.target_modules = sorted({name.rpartition(".")[2] for name in names})
        read = replace(config, unreached=[], inference_mode=True)
        if find_targets(model, read) != names:
            others = set(find_targets(model, replace(read, exclude_modules=None))).difference(names)
            config.exclude_modules = shortest_names(model, list(others))
    return names


def attach(model: nn.Module, config: LilyConfig, layers: Mapping[str, AdapterLayer]) -> None:
    """Let the layers of each kind, by the target module that names them and their shape, share ``A`` and ``B``."""
    groups: dict[Any, list[Any]] = {}
    for name, layer in layers.items():
        groups.setdefault((_target(name, config.target_modules), linear_view(layer)), []).append(layer)
    for group in groups.values():
        for number, layer in enumerate(group):
            leaders = group[number - number % config.stride_A], group[0]
            layer.lily_A, layer.lily_B = leaders[0].lily_A, leaders[1].lily_B
            layer.borrowed = frozenset(
                tensor for tensor, leader in zip(_SHARED, leaders, strict=True) if leader is not layer
            )


def _target(name: str, wanted: list[str] | str | None) -> str:
    """The longest entry of target_modules that names the module; a regular expression is one entry."""
    if isinstance(wanted, str):
        return wanted
    return max((entry for entry in wanted or () if module_matches(name, entry)), key=len)


wrap = LilyLinear
