"""The layer of PVeRA (https://arxiv.org/abs/2512.07703), and the projections that all layers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.methods._delta import LowRank, factory_kwargs, share_projections
from peftcli.methods.pvera import PveraConfig


class PveraLinear(LowRank):
    """``y = W x + diag(lambda_b) B z``; ``z`` is drawn around ``diag(lambda_d) A x`` in training, and is that after it.

    Only the vectors train; ``lambda_b`` starts at zero. ``A: (2 r, in)`` gives a mean and the logarithm of a variance
    for each of ``r`` numbers. It and ``B: (out, r)`` are the first columns and rows of what all layers share.
    """

    shared = ("pvera_A", "pvera_B")
    fixed = shared

    def __init__(self, module: nn.Module, name: str, config: PveraConfig):
        super().__init__(module, name, "PVeRA", config.bias, config.pvera_dropout)
        like = factory_kwargs(self)
        self.pvera_lambda_b = nn.Parameter(torch.zeros(self.view.out_features, **like))
        self.pvera_lambda_d = nn.Parameter(torch.full((2 * config.r,), config.d_initial, **like))
        if not config.init_weights:
            nn.init.ones_(self.pvera_lambda_b)
            nn.init.normal_(self.pvera_lambda_d)
        self.saves_fixed, self.always_draws = config.save_projection, config.sample_at_inference

    def update(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.projections()
        z, logvar = (self.pvera_lambda_d * F.linear(x, a)).chunk(2, dim=-1)
        if self.training or self.always_draws:
            z = z + torch.randn_like(z) * (0.5 * logvar).exp()
        return self.pvera_lambda_b * F.linear(z, b)

    def delta(self) -> torch.Tensor:
        a, b = self.projections()
        means = len(a) // 2
        return (self.pvera_lambda_b.unsqueeze(1) * b) @ (self.pvera_lambda_d[:means].unsqueeze(1) * a[:means])


def attach(model: nn.Module, config: PveraConfig, layers: Mapping[str, Any]) -> None:
    """Draw ``A`` and ``B`` for all layers."""
    share_projections(list(layers.values()), "pvera", 2 * config.r, config.r, config.projection_prng_key)


wrap = PveraLinear
