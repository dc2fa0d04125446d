"""RMSNorm (https://arxiv.org/abs/1910.07467) as one autograd function.

The plain way is the model's own: ``weight * (x * rsqrt(mean(x^2) + eps))``, of which autograd keeps four tensors of the
size of ``x``, and which each linear layer behind it converts anew under autocast. This one keeps ``x``, and converts
once. Gradients are those of the plain way but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from peftcli.models.parts import stacks
from peftcli.models.probe import agrees, probing
from peftcli.tasks.text.token_ids import is_half_precision

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_EXACT, _ROUNDED = 1e-5, 0.02
"""How far outputs may be off by rounding, in float32 and in less, relative to their spread."""


def fuse_norms(model: nn.Module) -> None:
    """Let the frozen RMSNorms of a model's layers compute so, in evaluation too; others stay as they are.

    A model without values yet is taken at the names of its modules.
    """
    for _, layers in stacks(model):
        for norm in (child for layer in layers for child in layer.children()):
            if type(norm).__name__.endswith("RMSNorm") and "forward" not in vars(norm):
                epsilon = next((getattr(norm, name) for name in _EPSILONS if hasattr(norm, name)), None)
                if isinstance(epsilon, float) and _is_plain(norm, epsilon):
                    norm.forward = partial(_forward, norm, norm.forward, epsilon)


def _is_plain(norm: Any, epsilon: float) -> bool:
    """Return whether a module with a weight (H,) computes what this file does."""
    if list(norm._parameters) != ["weight"] or norm._forward_hooks or norm._forward_pre_hooks:
        return False
    weight = norm.weight
    if weight.is_meta:
        return True
    with probing(norm, weight.device):
        # values that the weight may have: another process may send them only later
        drawn, *x = torch.randn(5, *weight.shape, dtype=weight.dtype, device=weight.device)
        found = _RMSNorm.apply(torch.stack(x), drawn, epsilon, drawn.dtype)  # type: ignore[no-untyped-call]
        plain = functional_call(norm, {"weight": drawn}, torch.stack(x))
        return agrees(found, plain, _ROUNDED if is_half_precision(norm) else _EXACT)


def _forward(norm: Any, plain: Callable[..., Any], epsilon: float, x: torch.Tensor) -> Any:
    if norm.weight.requires_grad or torch.compiler.is_compiling():
        return plain(x)
    device, dtype = x.device.type, torch.promote_types(x.dtype, norm.weight.dtype)
    if torch.is_autocast_enabled(device) and x.dtype == torch.float32:
        dtype = torch.get_autocast_dtype(device)
    return _RMSNorm.apply(x, norm.weight, epsilon, dtype)  # type: ignore[no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """``x: (..., H)``, ``weight: (H,)`` -> (..., H) of ``dtype``, computed in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype) -> torch.Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = size.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return x.mul(scale).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        along, normed = gradient.mul(weight).float(), x * scale
        mean = torch.linalg.vecdot(along, normed).unsqueeze(-1).div_(x.shape[-1])
        return torch.addcmul(along, normed, mean, value=-1).mul_(scale).to(x.dtype), None, None, None
