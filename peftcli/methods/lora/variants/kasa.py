"""KaSA: Knowledge-aware Singular-value Adaptation (https://arxiv.org/abs/2412.06071).

The r weakest directions of the base weight are taken away, and LoRA learns in their place, with a trained factor for
each of its own directions. PEFT changes the base weight; here the layer subtracts what the weak directions give, so
that the disabled layer is the base layer exactly.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import AdapterLayer, layers_below, widened
from peftcli.core.linear import dense_weight
from peftcli.errors import AdapterError
from peftcli.methods._delta import factory_kwargs, stored_weight
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.lora import LoraLinear


class KasaLinear(LoraLinear):
    """``y = (W - W_r) x + scaling * B (d * A x)`` with ``d: (r,)`` and ``W_r`` the r weakest directions of W."""

    fixed = ("weak_A", "weak_B")
    saves_fixed = False

    def __init__(self, base_layer: nn.Module, name: str, config: LoraConfig):
        super().__init__(base_layer, name, config)
        if self.view.transposed:
            raise AdapterError(f"{name} is a Conv1D; KaSA adapts Linear", key="kasa_config")
        if self.r >= min(self.view.in_features, self.view.out_features):
            raise AdapterError(f"{self.r} leaves nothing of {name}; KaSA takes r of its directions away", key="r")
        assert config.kasa_config
        self.beta, self.gamma = config.kasa_config.beta, config.kasa_config.gamma
        like = factory_kwargs(base_layer)
        self.lora_diag = nn.Parameter(torch.randn(self.r, **like))
        known = not stored_weight(base_layer).is_meta
        pair = weakest(dense_weight(base_layer), self.r) if known else (self.lora_A.weight, self.lora_B.weight)
        # parameters, since training on several devices sends buffers around at each step
        self.weak_A, self.weak_B = (nn.Parameter(part.detach().clone(), requires_grad=False) for part in pair)

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y = super().adapt(x, y)
        a, b = self._remaining(self.weak_A, self.weak_B)
        return y - F.linear(F.linear(x.to(a.dtype), a), b).to(y.dtype)

    def _remaining(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weak directions that other enabled KaSA layers below have not taken away yet, weakest last."""
        below = [layer.r for layer in layers_below(self) if isinstance(layer, KasaLinear)]
        kept = max(self.r - max(below, default=0), 0)
        return a[:kept], b[:, :kept]

    def update(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaling * self.lora_B(self.lora_diag * self.lora_A(x))

    def delta(self) -> torch.Tensor:
        return self.scaling * ((self.lora_B.weight * self.lora_diag) @ self.lora_A.weight)

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        merged, weight = super().merged_tensors(base), base["weight"]
        # weights that come one by one are not known before
        known = not self.weak_A.is_meta and not stored_weight(self.base_layer).is_meta
        pair = (self.weak_A, self.weak_B) if known else weakest(widened(weight), self.r)
        a, b = self._remaining(*pair)
        return merged | {"weight": merged["weight"] - b @ a}

    def penalty(self) -> torch.Tensor:
        """Return what training adds to the loss for this layer: a scalar."""
        a, b, identity = self.lora_A.weight, self.lora_B.weight, torch.eye(self.r, device=self.lora_diag.device)
        apart = torch.linalg.norm(b.T @ b - identity) + torch.linalg.norm(a @ a.T - identity)
        return self.beta * self.lora_diag.square().sum() + self.gamma * apart


def penalty(layers: Iterable[AdapterLayer]) -> torch.Tensor | None:
    """Return the sum over the KaSA layers among these of what they add to the loss, or None."""
    parts = [layer.penalty() for layer in layers if isinstance(layer, KasaLinear)]
    return torch.stack(parts).sum() if parts else None


def weakest(weight: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (r, in) and B (out, r) of the r weakest directions of a weight (out, in), the weakest last."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return v[-r:], u[:, -r:] * s[-r:]
