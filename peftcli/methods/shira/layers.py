"""The layer of SHiRA (https://arxiv.org/abs/2406.13175)."""

from __future__ import annotations

import torch
from torch import nn

from peftcli.core.layer import base_module
from peftcli.errors import AdapterError
from peftcli.methods._delta import DeltaLinear, drawn_places, factory_kwargs, scattered
from peftcli.methods.shira import ShiraConfig


class ShiraLinear(DeltaLinear):
    """``delta: (out, in)`` is zero but for ``r * (in + out)`` trained numbers, at random places or those of a mask."""

    fixed = ("shira_indices",)
    shira_indices: torch.Tensor

    def __init__(self, module: nn.Module, name: str, config: ShiraConfig):
        super().__init__(module, name, "SHiRA")
        columns = self.view.in_features
        count = config.r * (columns + self.view.out_features)
        places = drawn_places(self, name, "r", count, config.random_seed).sort().values
        start = torch.zeros if config.init_weights else torch.randn
        self.shira_weight = nn.Parameter(start(count, **factory_kwargs(self)))
        if config.mask_fn is not None and not config.inference_mode:
            places = self._masked(name, config)
        self.register_buffer("shira_indices", torch.stack([places // columns, places % columns]).int())

    def _masked(self, name: str, config: ShiraConfig) -> torch.Tensor:
        """Return the places that the config's own function chooses, as indices into the flat weight (out, in)."""
        seed = {"random_seed": config.random_seed} if config.mask_type == "random" else {}
        mask = config.mask_fn(base_module(self), config.r, **seed)
        shape = (self.view.out_features, self.view.in_features)
        if not isinstance(mask, torch.Tensor) or mask.shape != shape or not ((mask == 0) | (mask == 1)).all():
            raise AdapterError(f"must return a tensor {shape} of zeros and ones for {name}", key="mask_fn")
        places = mask.flatten().nonzero().flatten()
        if len(places) != len(self.shira_weight):
            raise AdapterError(f"chose {len(places)} numbers of {name}, not {len(self.shira_weight)}", key="mask_fn")
        return places

    def delta(self) -> torch.Tensor:
        rows, columns = self.shira_indices.long()
        return scattered(self.shira_weight, rows * self.view.in_features + columns, self.view)


wrap = ShiraLinear
