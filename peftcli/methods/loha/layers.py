"""The layers of LoHa (https://arxiv.org/abs/2108.06098), and what LoKr shares with it, as in LyCORIS."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer, base_module
from peftcli.core.targets import pattern_value
from peftcli.methods._delta import DeltaConv, DeltaLinear, by_kind, draw_as_linear, factory_kwargs
from peftcli.methods.loha import LoHaConfig, LycorisConfig

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


class LycorisLayer(AdapterLayer):
    """How strong the delta is, and what of it is left out in training."""

    method: str
    """The method's name in messages."""
    rescaled = True
    """Whether to scale up what rank_dropout keeps, so that its mean stays the same."""

    def take(self, name: str, config: LycorisConfig) -> None:
        """Read the settings for the module ``name``."""
        self.r = int(pattern_value(config.rank_pattern, name, config.r))
        self.scaling = self.full_scaling = pattern_value(config.alpha_pattern, name, config.alpha) / self.r
        self.rank_dropout = config.rank_dropout
        self.module_dropout = config.module_dropout

    def start(self, shape: tuple[int, ...], window: tuple[int, ...], config: Any) -> None:
        """Make the weights of a delta ``shape``, (out, in) or (out, in, k...), whose ``window`` is taken apart too."""
        raise NotImplementedError

    def thinned(self, update: torch.Tensor, dim: int) -> torch.Tensor:
        """``update``, whose outputs are along ``dim``, without what a step of training leaves out."""
        if not self.training:
            return update
        if self.rank_dropout:
            kept = torch.rand(update.shape[dim], device=update.device) >= self.rank_dropout
            share = 1 - self.rank_dropout if self.rescaled else 1
            update = update * (kept.to(update.dtype) / share).unflatten(0, (-1, *[1] * (-dim - 1)))
        if self.module_dropout:  # by a factor: with several processes, each parameter needs its gradient every time
            update = update * (torch.rand((), device=update.device) >= self.module_dropout)
        return update


class LycorisLinear(LycorisLayer, DeltaLinear):
    """A linear layer with a LyCORIS delta."""

    kinds = "Linear, Conv1D, Conv1d and Conv2d"

    def __init__(self, module: nn.Module, name: str, config: LycorisConfig):
        super().__init__(module, name, self.method)
        self.take(name, config)
        self.start((self.view.out_features, self.view.in_features), (), config)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        return self.thinned(super().update(x), -1)


class LycorisConv(LycorisLayer, DeltaConv):
    """A convolution with a LyCORIS delta."""

    def __init__(self, module: nn.Module, name: str, config: LycorisConfig):
        super().__init__(module)
        self.take(name, config)
        window: tuple[int, ...] = base_module(self).kernel_size
        taken_apart = config.use_effective_conv2d and any(side > 1 for side in window)
        # a 1-d window is written with a second side of 1
        self.start(base_module(module).weight.shape, (*window, 1)[:2] if taken_apart else (), config)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        return self.thinned(super().update(x), 1 - base_module(self).weight.ndim)


def free(*shape: int, **like: object) -> nn.Parameter:
    """A parameter that is not filled yet."""
    return nn.Parameter(torch.empty(*shape, **like))  # type: ignore[call-overload]


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
        draw_as_linear(*self.own_tensors().values())
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
