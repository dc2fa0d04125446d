"""The LoRA layers of several models on one frozen linear layer, as one autograd function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from peftcli.methods.lora.fused import Pair, compute_dtype, drops, is_frozen

Share = tuple[int, Pair | None, float]
"""How many tokens are a model's, and its A, B and scaling; without a pair, they are not adapted."""
_WORTH_A_CALL = 7_000_000
"""How many multiplications take as long on a CPU as a call that makes few."""


def share_of(layer: Any, tokens: int) -> Share | None:
    """Return the share of a model with this LoRA layer, or with none. None: the layer computes in another way."""
    if layer is None:
        return tokens, None, 0.0
    pair = layer.fused_pair() if layer.enabled and not drops(layer) else None
    return None if pair is None or not is_frozen(layer.base_layer) else (tokens, pair, layer.scaling)


def joined_linear(x: torch.Tensor, base: nn.Linear, shares: Sequence[Share]) -> torch.Tensor:
    """Return ``W x + scaling * B A x``, each token with the A, B and scaling of its model.

    ``x`` has the models' tokens one after another: (1, N, in) or (N, in).
    """
    adapted = [(*pair, scaling) for _, pair, scaling in shares if pair is not None]
    rank, tokens = sum(len(a) for a, *_ in adapted), x.numel() // x.shape[-1]
    calls_saved = len(adapted) - 1 if x.device.type == "cpu" else 0
    made: torch.Tensor
    if tokens * rank * sum(base.weight.shape) <= _WORTH_A_CALL * calls_saved:
        a, b = torch.cat([a for a, *_ in adapted]), torch.cat([scaling * b for _, b, scaling in adapted], dim=1)
        made = _MaskedUpdate.apply(x, base.weight, base.bias, _blocks(shares), a, b)  # type: ignore[no-untyped-call]
        if _is_finite(made):  # or else one model's numbers would reach another's: 0 * inf is not 0
            return made.view(*x.shape[:-1], len(base.weight))
    pairs = [tensor for _, pair, _ in shares for tensor in pair or (None, None)]
    sizes, scalings = [size for size, *_ in shares], [scaling for *_, scaling in shares]
    made = _JoinedUpdate.apply(x, base.weight, base.bias, sizes, scalings, *pairs)  # type: ignore[no-untyped-call]
    return made.view(*x.shape[:-1], len(base.weight))


_Block = tuple[slice, slice]
"""The tokens of a model, and the rows of its A among those of all."""


def _blocks(shares: Sequence[Share]) -> list[_Block]:
    blocks, token, row = list[_Block](), 0, 0
    for size, pair, _ in shares:
        if pair is not None:
            rank = len(pair[0])
            blocks.append((slice(token, token + size), slice(row, row + rank)))
            row += rank
        token += size
    return blocks


def _is_finite(values: torch.Tensor) -> bool:
    return math.isfinite(float(values.detach().sum()))


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
        dtype = compute_dtype(x)
        flat, weight = x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype)
        saved = list[torch.Tensor | None]()
        with torch.autocast(x.device.type, enabled=False):
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
        ctx.shape, ctx.sizes, ctx.scalings = x.shape, sizes, scalings
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_made: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, weight, *saved = ctx.saved_tensors
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
        return None if of_x is None else of_x.view(ctx.shape), None, None, None, None, *of_pairs


class _MaskedUpdate(torch.autograd.Function):
    """As ``_JoinedUpdate``, for few tokens: the pairs of all as one, and zeros where a token meets another model's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        blocks: list[_Block],
        a: torch.Tensor,
        b: torch.Tensor,
    ) -> torch.Tensor:
        dtype = compute_dtype(x)
        flat, weight, a, b = (each.to(dtype) for each in (x.reshape(-1, x.shape[-1]), weight, a, b))
        own = flat.new_zeros(len(flat), len(a))
        for block in blocks:
            own[block] = 1
        with torch.autocast(x.device.type, enabled=False):
            made = F.linear(flat, weight, None if bias is None else bias.to(dtype))
            inner = F.linear(flat, a).mul_(own)
            made.addmm_(inner, b.T)
        ctx.save_for_backward(flat, weight, own, inner, a, b)
        ctx.shape, ctx.blocks = x.shape, blocks
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_made: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, weight, own, inner, a, b = ctx.saved_tensors
        of_inner, of_x = (of_made @ b).mul_(own), None
        if ctx.needs_input_grad[0]:
            of_x = (of_made @ weight).addmm_(of_inner, a).view(ctx.shape)
        if _is_finite(of_made):
            return of_x, None, None, None, of_inner.T @ flat, (inner.T @ of_made).T
        of_a = torch.cat([of_inner[tokens, rows].T @ flat[tokens] for tokens, rows in ctx.blocks])
        of_b = torch.cat([of_made[tokens].T @ inner[tokens, rows] for tokens, rows in ctx.blocks], dim=1)
        return of_x, None, None, None, of_a, of_b
