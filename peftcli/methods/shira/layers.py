"""The layer of SHiRA (https://arxiv.org/abs/2406.13175)."""

from __future__ import annotations

import torch
from torch import nn

from peftcli.methods._linear import DeltaLinear, factory_kwargs
from peftcli.methods._sparse import drawn_places, scattered
from peftcli.methods.shira.config import ShiraConfig


class ShiraLinear(DeltaLinear):
    """``delta: (out, in)`` is zero but for ``r * (in + out)`` trained numbers, at random places."""

    fixed = ("shira_indices",)
    shira_indices: torch.Tensor

    def __init__(self, module: nn.Module, name: str, config: ShiraConfig):
        super().__init__(module, name, "SHiRA")
        columns = self.view.in_features
        count = config.r * (columns + self.view.out_features)
        start = torch.zeros if config.init_weights else torch.randn
        self.shira_weight = nn.Parameter(start(count, **factory_kwargs(self)))
        places = drawn_places(self, name, "r", count, config.random_seed).sort().values
        self.register_buffer("shira_indices", torch.stack([places // columns, places % columns]).int())

    def delta(self) -> torch.Tensor:
        rows, columns = self.shira_indices.long()
        return scattered(self.shira_weight, rows * self.view.in_features + columns, self.view)


wrap = ShiraLinear
