"""The layer of DeLoRA (https://arxiv.org/abs/2503.18225)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.linear import dense_weight
from peftcli.core.targets import pattern_value
from peftcli.methods._delta import DeltaLinear, draw_as_linear, factory_kwargs
from peftcli.methods.delora import DeloraConfig

_SMALLEST_NORM = 1e-4


class DeloraLinear(DeltaLinear):
    """``delta = B diag(lambda / (r |b_i| |a_i|)) A diag(w)`` with ``A: (r, in)`` and ``B: (out, r)``.

    So the directions ``a_i`` and ``b_i`` count, not their lengths, and the trained number ``lambda`` alone says how
    large the update is. ``w: (in,)`` are the norms of the base weight's columns; ``B`` starts at zero.
    """

    fixed = ("delora_w_norm",)
    delora_w_norm: torch.Tensor

    def __init__(self, module: nn.Module, name: str, config: DeloraConfig):
        super().__init__(module, name, "DeLoRA", config.bias, config.module_dropout)
        r = int(pattern_value(config.rank_pattern, name, config.r))
        bound = pattern_value(config.lambda_pattern, name, config.delora_lambda)
        like = factory_kwargs(self)
        self.delora_A = nn.Parameter(torch.empty(r, self.view.in_features, **like))
        self.delora_B = nn.Parameter(torch.zeros(self.view.out_features, r, **like))
        self.delora_lambda = nn.Parameter(torch.full((1,), float(bound), **like))
        draw_as_linear(self.delora_A)
        if not config.init_weights:
            draw_as_linear(self.delora_B)
        self.register_buffer("delora_w_norm", dense_weight(module).norm(dim=0))

    def update(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self._scales() * F.linear(x * self.delora_w_norm, self.delora_A), self.delora_B)

    def delta(self) -> torch.Tensor:
        return (self.delora_B * self._scales()) @ (self.delora_A * self.delora_w_norm)

    def _scales(self) -> torch.Tensor:
        """Return the factor of each direction: (r,)."""
        norms = [norm.clamp(min=_SMALLEST_NORM) for norm in (self.delora_A.norm(dim=1), self.delora_B.norm(dim=0))]
        return self.delora_lambda / len(self.delora_A) / (norms[0] * norms[1])


wrap = DeloraLinear
