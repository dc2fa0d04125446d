"""The layer of Uni-LoRA (https://arxiv.org/abs/2506.00799), and the vector that all layers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from peftcli.errors import AdapterError
from peftcli.methods._delta import LowRank, factory_kwargs, in_base_dtype, stored_weight
from peftcli.methods.unilora import UniLoraConfig

_PLACES = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")

_MOST_PLACES = 200_000_000
"""Gigabytes while they are drawn."""


class UniLoraLinear(LowRank):
    """``delta = B A``; every number of both is one of the model's trained vector, times a fixed scale.

    A number of the vector that stands at ``n`` places has the scale ``1 / sqrt(n)`` there, so that the map from the
    vector to all layers' matrices keeps lengths.
    """

    shared = ("unilora_theta_d",)
    fixed = _PLACES
    unilora_theta_d: nn.Parameter

    def __init__(self, module: nn.Module, name: str, config: UniLoraConfig):
        super().__init__(module, name, "Uni-LoRA", config.bias, config.unilora_dropout)
        self.shapes = {"A": (config.r, self.view.in_features), "B": (self.view.out_features, config.r)}
        self.saves_fixed = config.save_indices

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._matrix("A"), self._matrix("B")

    def _matrix(self, which: str) -> torch.Tensor:
        indices, scales = getattr(self, f"unilora_indices_{which}"), getattr(self, f"unilora_scales_{which}")
        # threads would add the gradients of theta_d[indices] in any order
        chosen = self.unilora_theta_d.to(indices.device).index_select(0, indices.flatten())
        return chosen.view(indices.shape) * scales


def attach(model: nn.Module, config: UniLoraConfig, layers: Mapping[str, Any]) -> None:
    """Give every layer the vector, and the places of its numbers in the layer's matrices."""
    own = list(layers.values())
    sizes = [rows * columns for layer in own for rows, columns in layer.shapes.values()]
    if sum(sizes) > _MOST_PLACES:
        raise AdapterError(f"{config.r:,} makes matrices of {sum(sizes):,} numbers", key="r")
    theta = torch.empty(config.theta_d_length, **factory_kwargs(own[0]))
    bound = config.init_theta_d_bound
    if config.init_weights:
        nn.init.uniform_(theta, -bound, bound)
    else:
        nn.init.normal_(theta)
    parameter = nn.Parameter(theta)
    in_file = config.save_indices and config.inference_mode
    indices = torch.zeros(sum(sizes), dtype=torch.long) if in_file else _assigned(sum(sizes), config)
    scales = indices.bincount(minlength=config.theta_d_length).float().rsqrt()[indices]
    parts = zip(indices.split(sizes), scales.split(sizes), strict=True)
    for layer in own:
        layer.unilora_theta_d = parameter
        weight, like = stored_weight(layer), factory_kwargs(layer)
        device = "cpu" if weight.is_meta else weight.device
        for which, shape in layer.shapes.items():
            places, scale = next(parts)
            scale = in_base_dtype(scale, weight)
            layer.register_buffer(f"unilora_indices_{which}", places.view(shape).to(device))
            layer.register_buffer(f"unilora_scales_{which}", scale.view(shape).to(device, like["dtype"]))


def _assigned(count: int, config: UniLoraConfig) -> torch.Tensor:
    """Draw which number of the vector stands at each of ``count`` places: each at as many as the others, at random.

    PEFT leaves the choice to NumPy, and its files may hold the seed alone.
    """
    times, left = divmod(count, config.theta_d_length)
    random = np.random.default_rng(config.proj_seed)
    assigned = np.repeat(np.arange(config.theta_d_length), times)
    if left:
        assigned = np.concatenate([assigned, random.choice(config.theta_d_length, left, replace=False)])
    random.shuffle(assigned)
    return torch.from_numpy(assigned)


wrap = UniLoraLinear
