"""The layer of DEFT (https://arxiv.org/abs/2509.22793)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import widened
from peftcli.core.linear import dense_weight
from peftcli.methods._delta import WeightDeltaLinear, base_product, factory_kwargs
from peftcli.methods.deft import DeftConfig


class DeftLinear(WeightDeltaLinear):
    """``delta = Q (scaling * R - K^T W)``: ``K^T W`` is taken away, ``R: (r, in)`` is given back.

    ``Q`` and ``K`` come from ``P: (out, r)``. With ``qr`` they are its orthonormal columns, so that ``Q K^T`` is a
    projection; with ``relu`` they are ``P`` and ``relu(P)``. ``R`` starts at ``K^T W / scaling``.
    """

    def __init__(self, module: nn.Module, name: str, config: DeftConfig):
        super().__init__(module, name, "DEFT", config.bias, config.deft_dropout)
        r, like = min(config.r, self.view.out_features), factory_kwargs(self)
        self.orthogonal = config.decomposition_method == "qr"
        self.scaling = config.alpha / r if config.alpha else 1.0
        self.deft_P = nn.Parameter(0.02 * torch.randn(self.view.out_features, r, **like))
        self.register_parameter("deft_R", None if config.para else nn.Parameter(self._start(module, config)))

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k = self._directions()
        change = -base_product(self, x, y).to(k.dtype) @ k
        if self.deft_R is not None:
            change = change + self.scaling * F.linear(self.dropout(x.to(k.dtype)), widened(self.deft_R))
        return y + F.linear(change, q).to(y.dtype)

    def delta_of(self, weight: torch.Tensor) -> torch.Tensor:
        q, k = self._directions()
        change = -k.T @ self.view.as_stored(weight)
        if self.deft_R is not None:
            change = change + self.scaling * self.deft_R
        return self.view.as_stored(q @ change)

    def _directions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``Q`` and ``K``: (out, r) each, in float32 or wider."""
        p = widened(self.deft_P)
        if self.orthogonal:
            q, _ = torch.linalg.qr(p)
            return q, q
        return p, p.relu()

    @torch.no_grad()
    def _start(self, module: nn.Module, config: DeftConfig) -> torch.Tensor:
        """``R`` as it starts."""
        weight, (_, k) = dense_weight(module), self._directions()
        if config.init_weights:
            return k.T @ weight / self.scaling
        return 0.02 * config.init_scale * torch.randn(k.shape[1], weight.shape[1], **factory_kwargs(module))


wrap = DeftLinear
