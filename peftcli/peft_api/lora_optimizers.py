"""Optimizers that know of A and B: LoRA-FA and Riemannian preconditioning.

LoRA-FA (https://arxiv.org/abs/2308.03303) leaves A as it is, so that its inputs need not be kept, and turns the
gradient of B into the one whose update is nearest to that of full fine-tuning: ``g_B (A A^T)^-1 / scaling^2``.
Riemannian preconditioning (https://arxiv.org/abs/2402.02347) multiplies both gradients by small matrices, which makes
the update depend less on how the product B A is split: ``(B^T B + c I)^-1 g_A`` and ``g_B (A A^T + c I)^-1``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftcli.core.layer import adapter_dtype, adapter_layers
from peftcli.methods.lora.lora import LoraLayer

_SMALL = 1e-8


@dataclass(frozen=True)
class MatrixPair:
    """A and B of one layer."""

    a: nn.Parameter
    """(r, in)"""
    b: nn.Parameter
    """(out, r)"""
    scaling: float


def matrix_pairs(model: nn.Module) -> list[MatrixPair]:
    """Return A and B of the model's LoRA layers that train and are matrices: not those of convolutions, embeddings."""
    found = []
    for layer in adapter_layers(model).values():
        a, b = (getattr(getattr(layer, name, None), "weight", None) for name in ("lora_A", "lora_B"))
        if not isinstance(layer, LoraLayer) or not isinstance(a, nn.Parameter) or not isinstance(b, nn.Parameter):
            continue
        if a.ndim == b.ndim == 2 and len(a) == b.shape[1] and a.requires_grad and b.requires_grad:
            found.append(MatrixPair(a, b, layer.scaling))
    return found


class LoraFAOptimizer(torch.optim.Optimizer):
    """LoRA-FA's AdamW. ``eps`` is added before the second moment's bias is corrected, and the decay comes last."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        pairs: Iterable[MatrixPair],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        """Train ``parameters``, of which those that are B of ``pairs`` in LoRA-FA's way. Their A does not train."""
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.pairs: Mapping[nn.Parameter, MatrixPair] = {pair.b: pair for pair in pairs}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Change the parameters that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._change(parameter, group)
        return loss

    def _change(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        state, (first, second), rate = self.state[parameter], group["betas"], group["lr"]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        gradient = self._gradient(parameter)
        state["exp_avg"].mul_(first).add_(gradient, alpha=1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = rate * math.sqrt(1 - second ** state["step"]) / (1 - first ** state["step"])
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
        parameter.mul_(1 - rate * group["weight_decay"])

    def _gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        assert parameter.grad is not None
        pair = self.pairs.get(parameter)
        if pair is None:
            return parameter.grad
        dtype = adapter_dtype(pair.a)
        gradient = parameter.grad.to(dtype) @ _inverse(pair.a.to(dtype), _SMALL) / pair.scaling**2
        return gradient.to(parameter.dtype)


@torch.no_grad()
def precondition(pairs: Iterable[MatrixPair], damping: float) -> None:
    """Multiply the gradients of A and B by Riemannian preconditioning's matrices."""
    for pair in pairs:
        dtype = adapter_dtype(pair.a)
        a, b = pair.a.to(dtype), pair.b.to(dtype)
        if pair.a.grad is not None:
            pair.a.grad.copy_(_inverse(b.T, damping) @ pair.a.grad.to(dtype))
        if pair.b.grad is not None:
            pair.b.grad.copy_(pair.b.grad.to(dtype) @ _inverse(a, damping))


def _inverse(rows: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the inverse of ``rows rows^T`` with ``damping`` on its diagonal: (r, r)."""
    square = rows @ rows.T
    return torch.linalg.pinv(square + damping * torch.eye(len(square), device=rows.device, dtype=rows.dtype))
