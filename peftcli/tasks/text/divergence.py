"""How far one model's distribution over the next token is from another's.

Forward and reverse KL, and JSD with equal weights: https://arxiv.org/abs/2306.13649
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

Kind = Literal["forward_kl", "reverse_kl", "jsd"]


def divergences(own: torch.Tensor, other: torch.Tensor, kind: Kind, temperature: float) -> torch.Tensor:
    """Return the divergence of each row, (N,), in float32.

    Args:
        own: Logits (N, V), in which the divergence has gradients.
        other: The logits of the model to agree with, (N, V).
        kind: forward_kl is KL(other || own), reverse_kl is KL(own || other), jsd the mean of the KL of both to their
            mean.
        temperature: What divides all logits.
    """
    apply: Any = _Divergences.apply  # which has no types
    found: torch.Tensor = apply(own, other, kind, temperature)
    return found


class _Divergences(torch.autograd.Function):
    """The gradient is 0, and not a rounding error, where both are equal: Adam would make steps of any size of one."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, other: torch.Tensor, kind: Kind, temperature: float) -> torch.Tensor:
        logs, others = ((each.float() / temperature).log_softmax(-1) for each in (own, other))
        gap = logs - others
        if kind == "forward_kl":
            shares = others.exp()
            losses, gradient = -(shares * gap).sum(-1), logs.exp_().sub_(shares)
        elif kind == "reverse_kl":
            shares = logs.exp_()
            losses = (shares * gap).sum(-1)
            gradient = shares.mul_(gap.sub_(losses[:, None]))
        else:
            # log(p / m) of the mean m of p and q is log(2) - log(1 + q / p)
            shares, halves = logs.exp_(), math.log(2) - F.softplus(-gap)
            part = (shares * halves).sum(-1)
            losses = (part + (others.exp_() * (math.log(2) - F.softplus(gap))).sum(-1)) / 2
            gradient = shares.mul_(halves.sub_(part[:, None])).div_(2)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(gradient.div_(temperature).to(own.dtype))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * weights[:, None]).to(gradient.dtype), None, None, None
