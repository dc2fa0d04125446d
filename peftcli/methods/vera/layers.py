"""The layer of VeRA (https://arxiv.org/abs/2310.11454), and the projections that all layers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.methods._delta import LowRank, factory_kwargs, share_projections
from peftcli.methods.vera import VeraConfig


class VeraLinear(LowRank):
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
        a, b = self.projections()
        return self.vera_lambda_b * F.linear(self.vera_lambda_d * F.linear(x, a), b)

    def delta(self) -> torch.Tensor:
        a, b = self.projections()
        return (self.vera_lambda_b.unsqueeze(1) * b) @ (self.vera_lambda_d.unsqueeze(1) * a)


def attach(model: nn.Module, config: VeraConfig, layers: Mapping[str, Any]) -> None:
    """Draw ``A`` and ``B`` for all layers."""
    share_projections(list(layers.values()), "vera", config.r, config.r, config.projection_prng_key)


wrap = VeraLinear
