"""The layers of LoKr (https://arxiv.org/abs/2309.14859)."""

from __future__ import annotations

import math

import torch
from torch import nn

from peftcli.methods._delta import by_kind, draw_as_linear, factory_kwargs
from peftcli.methods.loha.layers import CONVOLUTIONS, LycorisConv, LycorisLayer, LycorisLinear, free
from peftcli.methods.lokr import LoKrConfig


class LoKrLayer(LycorisLayer):
    """``delta = scaling * kron(W1, W2)`` with ``W1: (out1, in1)``, ``W2: (out2, in2)``; ``W1`` starts at zero.

    ``W2`` is a product ``A B`` of inner size r where that is smaller; ``W1`` too with decompose_both.
    """

    method = "LoKr"
    lokr_w1: nn.Parameter | None
    lokr_w2: nn.Parameter | None
    lokr_t2: nn.Parameter | None

    def start(self, shape: tuple[int, ...], window: tuple[int, ...], config: LoKrConfig) -> None:
        self.rescaled, self.shape = config.rank_dropout_scale, shape
        r, like = self.r, factory_kwargs(self)
        (out1, out2), (in1, in2) = (factors(side, config.decompose_factor) for side in shape[:2])
        self.lokr_w1 = self.lokr_w2 = self.lokr_t2 = None
        if config.decompose_both and r < max(out1, in1) / 2:
            self.lokr_w1_a, self.lokr_w1_b = free(out1, r, **like), free(r, in1, **like)
        else:
            self.lokr_w1 = free(out1, in1, **like)
        if r >= max(out2, in2) / 2:
            self.lokr_w2 = free(out2, in2, *shape[2:], **like)
        elif window:
            self.lokr_t2 = free(r, r, *window, **like)
            self.lokr_w2_a, self.lokr_w2_b = free(r, out2, **like), free(r, in2, **like)
        else:
            self.lokr_w2_a, self.lokr_w2_b = free(out2, r, **like), free(r, in2 * math.prod(shape[2:]), **like)
        draw_as_linear(*self.own_tensors().values())
        if config.init_weights is True:
            nn.init.zeros_(self.lokr_w1_a if self.lokr_w1 is None else self.lokr_w1)
        elif config.init_weights == "lycoris":
            nn.init.zeros_(self.lokr_w2_b if self.lokr_w2 is None else self.lokr_w2)

    def first(self) -> torch.Tensor:
        """``scaling * W1``: (out1, in1)."""
        return self.scaling * (self.lokr_w1_a @ self.lokr_w1_b if self.lokr_w1 is None else self.lokr_w1)

    def second(self) -> torch.Tensor:
        """``W2``: (out2, in2), (out2, in2 * k...) or (out2, in2, k...)."""
        if self.lokr_w2 is not None:
            return self.lokr_w2
        if self.lokr_t2 is not None:
            return torch.einsum("ijkl,io,jc->ockl", self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b)
        return self.lokr_w2_a @ self.lokr_w2_b

    def delta(self) -> torch.Tensor:
        first, second = self.first(), self.second()
        # PEFT sets the sides of W1 against the last two of W2, which are others in a kernel (out2, in2, k) of Conv1d
        sides = "ac,oik->oaick" if second.ndim == 3 else "ac,oi...->aoci..."
        return torch.einsum(sides, first, second).reshape(self.shape)


class LoKrLinear(LoKrLayer, LycorisLinear):
    """LoKr over a linear layer."""

    def update(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.first(), self.second()
        pieces = x.unflatten(-1, (first.shape[1], second.shape[1]))  # kron(W1, W2) x = W1 X W2', x cut into rows of X
        return self.thinned((first @ (pieces @ second.T)).flatten(-2), -1)


class LoKrConv(LoKrLayer, LycorisConv):
    """LoKr over a convolution."""


wrap = by_kind({CONVOLUTIONS: LoKrConv}, otherwise=LoKrLinear)


def factors(side: int, first: int) -> tuple[int, int]:
    """Two factors of ``side``: ``first`` and the rest, or else the two nearest to one another, none above ``first``.

    ``first`` -1 sets no bound.
    """
    if first > 0 and side % first == 0:
        return first, side // first
    most = math.isqrt(side) if first == -1 else min(first, math.isqrt(side))
    lower = next(factor for factor in range(most, 0, -1) if side % factor == 0)
    return lower, side // lower
