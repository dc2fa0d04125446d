"""The base of the layers of LyCORIS's methods (https://arxiv.org/abs/2309.14859)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer, base_module
from peftcli.core.targets import pattern_value
from peftcli.methods._conv import DeltaConv
from peftcli.methods._linear import DeltaLinear
from peftcli.methods._lycoris_settings import LycorisConfig

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
