"""The layers of MiSS (https://arxiv.org/abs/2409.15371)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import AdapterLayer
from peftcli.errors import AdapterError
from peftcli.methods._delta import DeltaLinear, WeightDeltaLinear, draw_as_linear, factory_kwargs
from peftcli.methods.miss import MissConfig


class MissLinear(DeltaLinear):
    """Every ``r`` inputs are met by the same block: ``delta[:, i] = block[i % r]`` with ``block: (r, out)``.

    So the input is summed over its pieces of ``r`` first. A block ``(r, mini_r)`` is repeated along the outputs too.
    """

    def __init__(self, module: nn.Module, name: str, config: MissConfig):
        super().__init__(module, name, "MiSS", config.bias, config.miss_dropout)
        out_features = self.view.out_features
        columns = config.mini_r if config.init_weights == "mini" else out_features
        if config.r > self.view.in_features:
            raise AdapterError(f"{config.r} is above {self.view.in_features}, the inputs of {name}", key="r")
        if out_features % columns:
            raise AdapterError(f"{columns} does not divide {out_features}, the outputs of {name}", key="mini_r")
        self.miss_block = nn.Parameter(torch.zeros(config.r, columns, **factory_kwargs(self)))
        if not config.init_weights:
            draw_as_linear(self.miss_block)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        r = len(self.miss_block)
        pieces = F.pad(x, (0, -x.shape[-1] % r)).unflatten(-1, (-1, r))
        return pieces.sum(-2) @ self._block()

    def delta(self) -> torch.Tensor:
        rows = torch.arange(self.view.in_features, device=self.miss_block.device) % len(self.miss_block)
        return self._block()[rows].T

    def _block(self) -> torch.Tensor:
        """The block as wide as the outputs: (r, out)."""
        repeats = self.view.out_features // self.miss_block.shape[1]
        return self.miss_block if repeats == 1 else self.miss_block.repeat(1, repeats)


class MissBat(WeightDeltaLinear):
    """The weight in blocks ``(r, r)``, those of one row sharing a trained one: ``delta_ij = (W_ij + I) block_i``."""

    def __init__(self, module: nn.Module, name: str, config: MissConfig):
        super().__init__(module, name, "MiSS", config.bias)
        for side in (self.view.in_features, self.view.out_features):
            if side % config.r:
                raise AdapterError(f"{config.r} does not divide {side}, a side of {name}; bat needs that", key="r")
        count = self.view.out_features // config.r
        self.miss_block = nn.Parameter(torch.zeros(count, config.r, config.r, **factory_kwargs(self)))

    def delta_of(self, weight: torch.Tensor) -> torch.Tensor:
        rows = self.view.as_stored(weight)  # (out, in)
        r = self.miss_block.shape[-1]
        blocks = rows.unflatten(0, (-1, r)).unflatten(-1, (-1, r)).transpose(1, 2)  # (out / r, in / r, r, r)
        block = self.miss_block.unsqueeze(1).to(rows.dtype)
        delta = blocks @ block + block
        return self.view.as_stored(delta.transpose(1, 2).reshape(rows.shape))


def wrap(module: nn.Module, name: str, config: MissConfig) -> AdapterLayer:
    """The MiSS layer over ``module``."""
    kind = MissBat if config.init_weights == "bat" else MissLinear
    return kind(module, name, config)
