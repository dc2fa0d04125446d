"""The LoRA layers of several models on one frozen linear layer, as one autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from peftcli.methods.lora.fused import Pair

Share = tuple[int, Pair | None, float]
"""How many tokens are a model's, and its A, B and scaling; without a pair, they are not adapted."""


def joined_linear(x: torch.Tensor, base: nn.Linear, shares: Sequence[Share]) -> torch.Tensor:
    """Return ``W x + scaling * B A x``, each token with the A, B and scaling of its model.

    Args:
        x: The models' tokens one after another: (1, N, in) or (N, in).
        base: The frozen layer.
        shares: Of each model.
    """
    pairs = [tensor for _, pair, _ in shares for tensor in pair or (None, None)]
    sizes, scalings = [size for size, *_ in shares], [scaling for *_, scaling in shares]
    made: torch.Tensor = _JoinedUpdate.apply(x, base.weight, base.bias, sizes, scalings, *pairs)  # type: ignore[no-untyped-call]
    return made


class _JoinedUpdate(torch.autograd.Function):
    """As ``fused._Update``, with a pair of matrices for each share of the tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        sizes: list[int],
        scalings: list[float],
        *pairs: torch.Tensor | None,
    ) -> torch.Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        flat, weight = x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype)
        saved = list[torch.Tensor | None]()
        with torch.autocast(device, enabled=False):
            made = F.linear(flat, weight, None if bias is None else bias.to(dtype))
            shares = zip(flat.split(sizes), made.split(sizes), scalings, pairs[::2], pairs[1::2], strict=True)
            for part, output, scaling, a, b in shares:
                inner = None
                if a is not None and b is not None:
                    a, b = a.to(dtype), b.to(dtype)
                    inner = F.linear(part, a)
                    output.addmm_(inner, b.T, alpha=scaling)
                saved += [inner, a, b]
        ctx.save_for_backward(flat, weight, *saved)
        ctx.sizes, ctx.scalings = sizes, scalings
        return made.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, weight, *saved = ctx.saved_tensors
        of_made = gradient.reshape(-1, gradient.shape[-1])
        of_x = of_made @ weight if ctx.needs_input_grad[0] else None
        parts = flat.split(ctx.sizes), of_made.split(ctx.sizes), ctx.scalings, saved[::3], saved[1::3], saved[2::3]
        of_pairs, start = list[torch.Tensor | None](), 0
        for x, of_output, scaling, inner, a, b in zip(*parts, strict=True):
            if inner is None:
                of_pairs += [None, None]
            else:
                of_inner = (of_output @ b).mul_(scaling)
                if of_x is not None:
                    of_x[start : start + len(x)].addmm_(of_inner, a)
                of_pairs += [of_inner.T @ x, (inner.T @ of_output).T.mul_(scaling)]
            start += len(x)
        of_x = None if of_x is None else of_x.view(*gradient.shape[:-1], -1)
        return of_x, None, None, None, None, *of_pairs
