"""LoRA's update as one autograd function: in the base layer's dtype, with its input saved once.

The plain way is ``y + (scaling * lora_B(lora_A(x))).to(y.dtype)``: it computes in the adapter's dtype, or under
autocast converts the input there and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from peftcli.core.linear import PLAIN_WEIGHTS


@dataclass
class Switch:
    """What is on or off for the whole process."""

    enabled: bool


FUSED = Switch(enabled=True)
"""Whether plain layers compute their update in this way."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""A (r, in) and B (out, r)."""


def plain_weight(module: Any) -> nn.Parameter | None:
    """Return the weight of a linear layer that multiplies by it and does no more; None for another module.

    Nobody watches or replaces its calls, and the weight is an ordinary one.
    """
    if type(module) is not nn.Linear:
        return None
    own = module.__dict__
    if own["_forward_pre_hooks"] or own["_forward_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return None
    weight: nn.Parameter | None = own["_parameters"].get("weight")
    # accelerate replaces ``forward``, to bring an offloaded weight; a quantised weight is of another type
    return weight if type(weight) in PLAIN_WEIGHTS and "forward" not in own else None


def plain_pair(layer: Any) -> Pair | None:
    """Return a layer's ``lora_A`` and ``lora_B`` if they are plain, and PyTorch runs what is called as it is.

    It does not while it compiles, traces, transforms (``torch.func``) or differentiates forward.
    """
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if recorded or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or not FUSED.enabled:
        return None
    parts = layer._modules  # an attribute of a module takes a microsecond
    a, b = plain_weight(parts["lora_A"]), plain_weight(parts["lora_B"])
    return None if a is None or b is None or parts["lora_B"]._parameters["bias"] is not None else (a, b)


def fused_output(layer: Any, pair: Pair, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return the output of a LoRA layer with the plain ``pair`` for ``x``; the rest is the base layer's."""
    base = layer._modules["base_layer"]
    given = layer._modules["lora_dropout"](x) if drops(layer) else x
    if given is x and torch.is_grad_enabled() and not (args or kwargs) and is_frozen(base):
        return adapted_linear(x, base, pair, layer.scaling)
    return add_update(base(x, *args, **kwargs), given, pair, layer.scaling)


def drops(layer: Any) -> bool:
    """Return whether dropout changes the layer's input."""
    dropout = layer._modules["lora_dropout"]
    return isinstance(dropout, nn.Dropout) and dropout.training


def is_frozen(module: nn.Module) -> bool:
    """Return whether ``adapted_linear`` takes ``module`` for its base layer."""
    weight = plain_weight(module)
    return weight is not None and not weight.requires_grad and (module.bias is None or not module.bias.requires_grad)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype that a frozen layer computes in for the input ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def add_update(y: torch.Tensor, x: torch.Tensor, pair: Pair, scaling: float) -> torch.Tensor:
    """Return ``y + scaling * B A x`` of ``y: (..., out)`` and ``x: (..., in)``, in the dtype of ``y``."""
    a, b = pair
    if torch.is_grad_enabled():
        added: torch.Tensor = _Update.apply(x, y, None, None, a, b, scaling)  # type: ignore[no-untyped-call]
        return added.view(y.shape)
    # of few tokens it is faster to convert them than A and B
    dtype = a.dtype if x.numel() < a.numel() else y.dtype
    if not a.dtype == x.dtype == y.dtype:
        x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
    update = F.linear(F.linear(x, a), b)
    return torch.add(y.to(dtype), update, alpha=scaling, out=update).to(y.dtype)


def adapted_linear(x: torch.Tensor, base: nn.Linear, pair: Pair, scaling: float) -> torch.Tensor:
    """Return what ``add_update`` does to the output of ``base`` for ``x``, with gradients."""
    made: torch.Tensor = _Update.apply(x, None, base.weight, base.bias, *pair, scaling)  # type: ignore[no-untyped-call]
    return made.view(*x.shape[:-1], len(base.weight))


def _flat(value: torch.Tensor) -> torch.Tensor:
    """Return (..., D) as (N, D)."""
    return value.reshape(-1, value.shape[-1])


class _Update(torch.autograd.Function):
    """``y + scaling * B A x`` as (N, out), with ``y`` given, or that of a frozen weight and bias for the same ``x``.

    Its output is no view of another tensor: models change their layers' outputs in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        y: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        dtype = compute_dtype(x) if y is None else y.dtype
        ctx.unconverted = all(each.dtype == dtype for each in (x, a, b, weight) if each is not None)
        x, a, b = (each.to(dtype) for each in (x, a, b))
        with torch.autocast(x.device.type, enabled=False):
            inner = F.linear(_flat(x), a)
            if weight is None:
                assert y is not None
                made = torch.addmm(_flat(y), inner, b.T, alpha=scaling)
            else:
                weight = weight.to(dtype)
                made = F.linear(_flat(x), weight, None if bias is None else bias.to(dtype))
                made.addmm_(inner, b.T, alpha=scaling)
        ctx.save_for_backward(x, inner, a, b, weight)
        ctx.scaling = scaling
        return made

    @staticmethod
    def backward(ctx: Any, of_made: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _gradients(ctx, of_made) if ctx.unconverted else _gradients_once(ctx, of_made)


def _gradients(ctx: Any, of_made: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # autograd converts what is returned to the dtypes of the inputs
    x, inner, a, b, weight = ctx.saved_tensors
    if torch.is_grad_enabled():  # the gradient is to be differentiated
        inner = F.linear(_flat(x), a)
    of_inner = (of_made @ b).mul_(ctx.scaling)
    of_x = of_y = of_a = of_b = None
    if ctx.needs_input_grad[0]:
        of_x = of_inner @ a if weight is None else (of_made @ weight).addmm_(of_inner, a)
        of_x = of_x.view(x.shape)
    if ctx.needs_input_grad[1]:
        of_y = of_made.reshape(*x.shape[:-1], len(b))
    if ctx.needs_input_grad[4]:
        of_a = of_inner.T @ _flat(x)
    if ctx.needs_input_grad[5]:
        of_b = (inner.T @ of_made).T.mul_(ctx.scaling)  # faster than the other way round
    return of_x, of_y, None, None, of_a, of_b, None


_gradients_once = once_differentiable(_gradients)
"""Of inputs that were converted, whose gradients would lead to the copies."""
