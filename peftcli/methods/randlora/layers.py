"""The layer of RandLoRA (https://arxiv.org/abs/2502.00987), and the bases that all layers share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peftcli.errors import AdapterError
from peftcli.methods._delta import LowRank, check_drawn, factory_kwargs, share_tensors
from peftcli.methods.randlora import RandLoraConfig

_MOST_COPIED = 256 * 2**20
"""Bytes of the random bases' copies in a file. On a model of 7B parameters they would be gigabytes."""


class RandLoraLinear(LowRank):
    """``delta = scaling * sum over n bases of B_n diag(lambda_n) A diag(gamma_n)``, of full rank.

    ``A: (r, 1, short)`` and ``B: (long, n, r)`` are random and shared by all layers, which use their first rows and
    columns; ``short`` is the smaller side of the weight. ``lambda: (r, n)``, which starts at zero, and
    ``gamma: (n, short)`` train.
    """

    shared = ("randlora_A", "randlora_B")
    fixed = shared

    def __init__(self, module: nn.Module, name: str, config: RandLoraConfig):
        super().__init__(module, name, "RandLoRA", config.bias, config.randlora_dropout)
        self.short, self.long = sorted((self.view.in_features, self.view.out_features))
        if self.short * config.r < 2:
            raise AdapterError(f"{config.r} makes bases of one number for {name}", key="r")
        self.scaling = config.randlora_alpha / config.r
        count, like = math.ceil(self.short / config.r), factory_kwargs(self)
        self.randlora_lambda = nn.Parameter(torch.zeros(config.r, count, **like))
        self.randlora_gamma = nn.Parameter(torch.full((count, self.short), 1 / max(count, self.short), **like))
        if not config.init_weights:
            nn.init.normal_(self.randlora_lambda)
            nn.init.constant_(self.randlora_gamma, 1 / self.long)
        self.saves_fixed = config.save_projection

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:  # (n * r, in) and (out, n * r)
        device, count = self.randlora_lambda.device, self.randlora_lambda.shape[1]
        a, b = self.randlora_A[..., : self.short].to(device), self.randlora_B[: self.long, :count].to(device)
        # PEFT's A counts r first and its B the bases first, so the pairs that meet are not those of the paper; the
        # file's numbers mean what they mean there
        scaled = (self.randlora_lambda.unsqueeze(2) * a * self.randlora_gamma).flatten(0, 1)
        fixed = b.flatten(1)
        return (scaled, fixed) if self.short == self.view.in_features else (fixed.T, scaled.T)


def attach(model: nn.Module, config: RandLoraConfig, layers: Mapping[str, Any]) -> None:
    """Draw ``A`` and ``B``, as large as the largest layer needs, and give them to every layer.

    They are drawn as PEFT draws them: its files may hold the seed alone.
    """
    own = list(layers.values())
    check_drawn(config.r, own)
    sides = [max(layer.view.in_features for layer in own), max(layer.view.out_features for layer in own)]
    count = math.ceil(min(sides) / config.r)
    generator = torch.Generator().manual_seed(config.projection_prng_key)
    if config.sparse or config.very_sparse:
        edge = 1 / (2 * (math.sqrt(min(sides)) if config.very_sparse else 3))
        a = _signs((config.r, 1, min(sides)), edge, generator)
        b = _signs((max(sides), count, config.r), edge, generator)
    else:
        a = _uniform((config.r, 1, min(sides)), generator)
        b = torch.cat([_uniform((max(sides), 1, config.r), generator) for _ in range(count)], dim=1)
    share_tensors(own, {"randlora_A": a / a.std(), "randlora_B": b / b.std()})
    if config.save_projection and 4 * len(own) * (a.numel() + b.numel()) <= _MOST_COPIED:
        for layer in own:
            layer.copies = layer.shared


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=torch.bfloat16)  # PEFT draws in half precision
    return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


def _signs(shape: tuple[int, ...], edge: float, generator: torch.Generator) -> torch.Tensor:
    """-1, 0 and 1, the first and the last with probability ``edge`` each."""
    drawn = torch.rand(shape, generator=generator)
    return (drawn > 1 - edge).float() - (drawn < edge).float()


wrap = RandLoraLinear
