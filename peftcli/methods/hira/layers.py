"""The layers of HiRA (https://openreview.net/forum?id=TwJrTz9cRS)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import base_module
from peftcli.core.linear import CONVOLUTIONS
from peftcli.methods._delta import (
    WeightDelta,
    WeightDeltaConv,
    WeightDeltaLinear,
    by_kind,
    check_ungrouped,
    draw_as_linear,
    factory_kwargs,
    lookup_scale,
)
from peftcli.methods.hira import HiraConfig


class HiraLinear(WeightDeltaLinear):
    """``delta = W * (B A)``, elementwise, with ``A: (r, in)`` and ``B: (out, r)``; ``B`` starts at zero."""

    kinds = "linear layers, convolutions, embeddings"

    def __init__(self, module: nn.Module, name: str, config: HiraConfig):
        super().__init__(module, name, "HiRA", dropout=config.hira_dropout)
        like = factory_kwargs(self)
        self.hira_A = nn.Parameter(torch.empty(config.r, self.view.in_features, **like))
        self.hira_B = nn.Parameter(torch.empty(self.view.out_features, config.r, **like))
        _start(self.hira_A, self.hira_B, config)

    def delta_of(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.view.as_stored(self.hira_B @ self.hira_A)


class HiraConv(WeightDeltaConv):
    """The same over a convolution's kernel, with ``A: (r, in, k...)`` and ``B: (out, r, 1...)``."""

    def __init__(self, module: nn.Module, name: str, config: HiraConfig):
        super().__init__(module, dropout=config.hira_dropout)
        weight = base_module(module).weight
        check_ungrouped(module, name, "HiRA")
        like, ones = factory_kwargs(self), [1] * (weight.ndim - 2)
        self.hira_A = nn.Parameter(torch.empty(config.r, *weight.shape[1:], **like))
        self.hira_B = nn.Parameter(torch.empty(weight.shape[0], config.r, *ones, **like))
        _start(self.hira_A, self.hira_B, config)

    def delta_of(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * (self.hira_B.flatten(1) @ self.hira_A.flatten(1)).view(weight.shape)


class HiraEmbedding(WeightDelta):
    """The same over an embedding, with ``A: (r, V)`` and ``B: (D, r)``; ``A`` starts at zero."""

    def __init__(self, module: nn.Module, name: str, config: HiraConfig):
        super().__init__(module)
        like, (vocabulary, width) = factory_kwargs(self), base_module(module).weight.shape
        start = torch.zeros if config.init_weights else torch.randn
        self.hira_embedding_A = nn.Parameter(start(config.r, vocabulary, **like))
        self.hira_embedding_B = nn.Parameter(torch.randn(width, config.r, **like))

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        factor = F.embedding(x, self.hira_embedding_A.T) @ self.hira_embedding_B.T
        return y + (lookup_scale(self) * F.embedding(x, base_module(self).weight) * factor).to(y.dtype)

    def delta_of(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * (self.hira_embedding_B @ self.hira_embedding_A).T


wrap = by_kind({CONVOLUTIONS: HiraConv, nn.Embedding: HiraEmbedding}, otherwise=HiraLinear)


def _start(a: nn.Parameter, b: nn.Parameter, config: HiraConfig) -> None:
    nn.init.normal_(a, std=1 / config.r if config.init_weights == "gaussian" else 1)
    if config.init_weights is True:
        draw_as_linear(a)
    if config.init_weights:
        nn.init.zeros_(b)
    else:
        nn.init.normal_(b)
