"""The layers of LoHa (https://arxiv.org/abs/2108.06098)."""

from __future__ import annotations

import math

import torch
from torch import nn

from peftcli.core.layer import base_module
from peftcli.methods._linear import by_kind, factory_kwargs
from peftcli.methods._lycoris import CONVOLUTIONS, LycorisConv, LycorisLayer, LycorisLinear, free
from peftcli.methods.loha import LoHaConfig


class LoHaLayer(LycorisLayer):
    """``delta = scaling * (A1 B1) * (A2 B2)``, elementwise, with ``A: (out, r)`` and ``B: (r, in)``.

    It starts at zero, as ``B2``, and has up to r * r independent rows. A kernel whose window is taken apart has
    ``A: (r, out)`` and a core ``T: (r, r, k, k)`` between ``A`` and ``B``.
    """

    method = "LoHa"
    hada_t1: nn.Parameter | None
    hada_t2: nn.Parameter | None

    def start(self, shape: tuple[int, ...], window: tuple[int, ...], config: LoHaConfig) -> None:
        r, like = self.r, factory_kwargs(self)
        rows, columns = shape[0], shape[1] if window else math.prod(shape[1:])
        outer = (r, rows) if window else (rows, r)
        self.hada_w1_a, self.hada_w1_b = free(*outer, **like), free(r, columns, **like)
        self.hada_w2_a, self.hada_w2_b = free(*outer, **like), free(r, columns, **like)
        self.hada_t1 = free(r, r, *window, **like) if window else None
        self.hada_t2 = free(r, r, *window, **like) if window else None
        for parameter in self.own_tensors().values():
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(self.hada_w2_b)

    def delta(self) -> torch.Tensor:
        first = _product(self.hada_w1_a, self.hada_w1_b, self.hada_t1)
        second = _product(self.hada_w2_a, self.hada_w2_b, self.hada_t2)
        return self.scaling * first * second


class LoHaLinear(LoHaLayer, LycorisLinear):
    """LoHa over a linear layer."""


class LoHaConv(LoHaLayer, LycorisConv):
    """LoHa over a convolution."""

    def delta(self) -> torch.Tensor:
        return super().delta().view(base_module(self).weight.shape)


wrap = by_kind({CONVOLUTIONS: LoHaConv}, otherwise=LoHaLinear)


def _product(a: torch.Tensor, b: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    return a @ b if core is None else torch.einsum("ijkl,io,jc->ockl", core, a, b)
