"""The layer of VeRA (https://arxiv.org/abs/2310.11454), and the projections that all layers share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.methods._linear import SharingLinear, check_drawn, factory_kwargs, share_tensors
from peftcli.methods.vera.config import VeraConfig


class VeraLinear(SharingLinear):
    """``delta = diag(lambda_b) B diag(lambda_d) A``, of which only the vectors train; ``lambda_b`` starts at zero.

    ``A: (r, in)`` and ``B: (out, r)`` are the first columns and rows of the matrices that all layers share.
    """

    shared = ("vera_A", "vera_B")
    fixed = shared

    def __init__(self, module: nn.Module, name: str, config: VeraConfig):
        super().__init__(module, name, "VeRA", config.bias, config.vera_dropout)
        like = factory_kwargs(self)
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.view.out_features, **like))
        self.vera_lambda_d = nn.Parameter(torch.full((config.r,), config.d_initial, **like))
        if not config.init_weights:
            nn.init.ones_(self.vera_lambda_b)
            nn.init.normal_(self.vera_lambda_d)
        self.saves_fixed = config.save_projection

    def update(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self._projections()
        return self.vera_lambda_b * F.linear(self.vera_lambda_d * F.linear(x, a), b)

    def delta(self) -> torch.Tensor:
        a, b = self._projections()
        return (self.vera_lambda_b.unsqueeze(1) * b) @ (self.vera_lambda_d.unsqueeze(1) * a)

    def _projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.vera_lambda_d.device
        a, b = self.vera_A[:, : self.view.in_features], self.vera_B[: self.view.out_features]
        return a.to(device), b.to(device)


def attach(model: nn.Module, config: VeraConfig, layers: Mapping[str, Any]) -> None:
    """Draw ``A`` and ``B``, as wide and as tall as the largest layer needs, and give them to every layer.

    They are drawn as PEFT draws them: its files may hold the seed alone.
    """
    own = list(layers.values())
    check_drawn(config.r, own)
    generator = torch.Generator().manual_seed(config.projection_prng_key)
    shapes = {
        "vera_A": (config.r, max(layer.view.in_features for layer in own)),
        "vera_B": (max(layer.view.out_features for layer in own), config.r),
    }
    share_tensors(own, {name: _uniform(shape, generator) for name, shape in shapes.items()})


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


wrap = VeraLinear
