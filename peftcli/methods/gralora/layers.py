"""The layer of GraLoRA (https://arxiv.org/abs/2505.20355)."""

from __future__ import annotations

import math

import torch
from torch import nn

from peftcli.errors import AdapterError
from peftcli.methods._delta import DeltaLinear, factory_kwargs
from peftcli.methods.gralora import GraloraConfig


class GraloraLinear(DeltaLinear):
    """The weight in ``k`` by ``k`` blocks: that from piece ``n`` of the input to piece ``m`` of the output has a LoRA.

    Its ``A`` is columns ``m`` of ``gralora_A[n]: (in / k, r)``, its ``B`` rows ``n`` of ``gralora_B[m]: (r, out / k)``,
    ``r`` being cut into ``k`` pieces there. ``B`` starts at zero. A plain LoRA of ``hybrid_r`` may stand beside them.
    """

    def __init__(self, module: nn.Module, name: str, config: GraloraConfig):
        super().__init__(module, name, "GraLoRA", config.bias, config.gralora_dropout)
        rows, columns, k = self.view.out_features, self.view.in_features, config.gralora_k
        for side in (columns, rows):
            if side % k:
                raise AdapterError(f"{k} does not divide {side}, a side of {name}", key="gralora_k")
        like = factory_kwargs(self)
        self.k, self.scaling = k, config.alpha / (config.r + config.hybrid_r)
        self.gralora_A = nn.Parameter(torch.empty(k, columns // k, config.r, **like))
        self.gralora_B = nn.Parameter(torch.zeros(k, config.r, rows // k, **like))
        _uniform(self.gralora_A, columns // k)
        if not config.init_weights:
            _uniform(self.gralora_B, config.r)
        self.hybrid = config.hybrid_r > 0
        if self.hybrid:
            self.gralora_A_general = nn.Linear(columns, config.hybrid_r, bias=False, **like)
            self.gralora_B_general = nn.Linear(config.hybrid_r, rows, bias=False, **like)
            if config.init_weights:
                nn.init.zeros_(self.gralora_B_general.weight)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self._blocks()
        inner = torch.einsum("...ni,nims->...mns", x.unflatten(-1, (self.k, -1)), a)
        z = torch.einsum("...mns,mnso->...mo", inner, b).flatten(-2)
        return self.scaling * (z + self.gralora_B_general(self.gralora_A_general(x)) if self.hybrid else z)

    def delta(self) -> torch.Tensor:
        a, b = self._blocks()
        delta = torch.einsum("nims,mnso->moni", a, b).reshape(self.view.out_features, self.view.in_features)
        if self.hybrid:
            delta = delta + self.gralora_B_general.weight @ self.gralora_A_general.weight
        return self.scaling * delta

    def _blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``A: (n, in / k, m, r / k)`` and ``B: (m, n, r / k, out / k)``."""
        return self.gralora_A.unflatten(2, (self.k, -1)), self.gralora_B.unflatten(1, (self.k, -1))


def _uniform(tensor: torch.Tensor, inputs: int) -> None:
    """Initialise as a linear layer with as many inputs does."""
    bound = 1 / math.sqrt(inputs)
    nn.init.uniform_(tensor, -bound, bound)


wrap = GraloraLinear
