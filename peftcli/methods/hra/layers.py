"""The layers of HRA (https://arxiv.org/abs/2405.17484)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import widened
from peftcli.methods._delta import by_kind, draw_as_linear, factory_kwargs
from peftcli.methods._rotation import RotatedConv, RotatedLinear, Rotating
from peftcli.methods.hra import HRAConfig


class HRALayer(Rotating):
    """``W' = W H_1 ... H_r`` with the reflections ``H_i = I - 2 u_i u_i'`` along the unit columns of ``u: (in, r)``."""

    method = "HRA"

    def start(self, features: int, name: str, config: HRAConfig) -> None:
        self.orthogonal = config.apply_GS
        self.hra_u = nn.Parameter(torch.empty(features, config.r, **factory_kwargs(self)))
        draw_as_linear(self.hra_u)
        if config.init_weights and not config.apply_GS:
            pairs = self.hra_u.data[:, : 2 * (config.r // 2)]
            pairs[:, 1::2] = pairs[:, ::2]

    def rotated(self, rows: torch.Tensor, back: bool = False) -> torch.Tensor:
        u = widened(self.hra_u)
        columns = _orthogonalised(u) if self.orthogonal else F.normalize(u, dim=0)
        vectors = list(columns.unbind(1))
        for vector in vectors if back else reversed(vectors):
            rows = rows - 2 * (rows @ vector)[..., None] * vector
        return rows


class HRALinear(HRALayer, RotatedLinear):
    """HRA over a linear layer."""


class HRAConv(HRALayer, RotatedConv):
    """HRA over a convolution."""


wrap = by_kind({nn.Conv2d: HRAConv}, otherwise=HRALinear)


def _orthogonalised(vectors: torch.Tensor) -> torch.Tensor:
    """The columns (in, r) made orthogonal and of length one, one after the other, by Gram and Schmidt."""
    done: list[torch.Tensor] = []
    for vector in vectors.unbind(1):
        for other in done:
            vector = vector - (other @ vector) * other
        done.append(vector / vector.norm())
    return torch.stack(done, 1)
