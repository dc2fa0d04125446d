"""The layer of PEANuT (https://arxiv.org/abs/2410.01870)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.methods._delta import WeightDeltaLinear, draw_as_linear, factory_kwargs
from peftcli.methods.peanut import PeanutConfig

_Function = Callable[[torch.Tensor], torch.Tensor]


class PeanutLinear(WeightDeltaLinear):
    """``delta^T = scaling * B f(A W^T)``, row by row, with ``A: (r, out)``, ``B: (out, r)``; ``B`` starts at zero.

    ``f`` is the activation, and with ``depth`` hidden layers ``(r, r)`` on the way in and as many on the way out, each
    of which adds what came in at its level.
    """

    def __init__(self, module: nn.Module, name: str, config: PeanutConfig):
        super().__init__(module, name, "PEANuT")
        r, outputs = config.r, self.view.out_features
        layer: Any = functools.partial(nn.Linear, bias=False, **factory_kwargs(self))
        self.peanut_A = layer(outputs, r)
        self.peanut_encoders = nn.ModuleList(layer(r, r) for _ in range(config.depth))
        self.peanut_decoders = nn.ModuleList(layer(r, r) for _ in range(config.depth))
        self.peanut_B = layer(r, outputs)
        parts = (self.peanut_A, *self.peanut_encoders, *self.peanut_decoders, self.peanut_B)
        draw_as_linear(*(part.weight for part in parts))
        if config.init_weights:
            nn.init.zeros_(self.peanut_B.weight)
        self.scaling, self.activation = config.scaling, config.act_fn

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        delta = self.delta()
        return y + F.linear(x.to(delta.dtype), delta).to(y.dtype)

    def delta_of(self, weight: torch.Tensor) -> torch.Tensor:
        function = _ACTIVATIONS[self.activation]
        rows = self.view.as_stored(weight).T.to(self.peanut_A.weight.dtype)
        z, levels = function(self.peanut_A(rows)), []
        for encoder in self.peanut_encoders:
            levels.append(z)
            z = function(encoder(z))
        for decoder in self.peanut_decoders:
            z = function(decoder(z)) + levels.pop()
        return self.view.as_stored((self.scaling * self.peanut_B(z)).T)


_TANH_GELU: _Function = functools.partial(F.gelu, approximate="tanh")
_ACTIVATIONS: dict[str, _Function] = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"), _TANH_GELU),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


wrap = PeanutLinear
