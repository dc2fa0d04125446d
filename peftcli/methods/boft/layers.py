"""The layers of BOFT (https://arxiv.org/abs/2311.06243)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer, base_module, widened
from peftcli.errors import AdapterError
from peftcli.methods._delta import by_kind, factory_kwargs
from peftcli.methods._rotation import RotatedConv, RotatedLinear, Rotating, cayley, leave_out
from peftcli.methods.boft import BOFTConfig


class BOFTLayer(Rotating):
    """``W' = s * (W R')`` with ``R`` a product of m factors, each block-diagonal between two permutations.

    ``boft_R: (m, blocks, k, k)`` holds matrices of which the skew part makes the rotations. ``s`` starts at one.
    """

    method = "BOFT"
    boft_s: nn.Parameter

    def start(self, features: int, name: str, config: BOFTConfig) -> None:
        size, count = block_sizes(features, name, config)
        self.boft_R = nn.Parameter(
            torch.zeros(config.boft_n_butterfly_factor, count, size, size, **factory_kwargs(self))
        )
        self.share = config.boft_dropout
        if not config.init_weights:
            nn.init.normal_(self.boft_R, std=0.1)
            nn.init.normal_(self.boft_s, mean=1, std=0.1)

    def rotated(self, rows: torch.Tensor, back: bool = False) -> torch.Tensor:
        factors = list(enumerate(self._blocks()))
        for factor, blocks in factors if back else reversed(factors):
            count, size, _ = blocks.shape
            pieces = _together(rows, size, 2**factor).unflatten(-1, (count, size))
            turned = torch.einsum("...nk,nkj->...nj", pieces, blocks.mT if back else blocks)
            rows = _apart(turned.flatten(-2), size, 2**factor)
        return rows

    def scaled(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.boft_s.flatten()[:, None]

    def adapt_from_file(self, tensor: str, value: torch.Tensor) -> torch.Tensor:
        factors = len(self.boft_R)
        if tensor == "boft_R" and len(value) == 1 < factors:
            # PEFT trains one factor, whatever the config says, where it cannot build its CUDA extension
            return torch.cat([value, value.new_zeros(factors - 1, *value.shape[1:])])
        return value

    def _blocks(self) -> torch.Tensor:
        """The rotations of all factors: (m, blocks, k, k)."""
        blocks = cayley(widened(self.boft_R - self.boft_R.mT) / 2)
        return leave_out(blocks, self.share) if self.training and self.share else blocks


class BOFTLinear(BOFTLayer, RotatedLinear):
    """BOFT over a linear layer; ``s`` is (out, 1)."""

    def start(self, features: int, name: str, config: BOFTConfig) -> None:
        self.boft_s = nn.Parameter(torch.ones(self.view.out_features, 1, **factory_kwargs(self)))
        super().start(features, name, config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = super().forward(x, *args, **kwargs)
        if not self.enabled:
            return y
        scale, bias = self.boft_s.flatten(), self._bias(x)
        scaled = y * scale if bias is None else y * scale + bias * (1 - scale)
        return scaled.to(y.dtype)

    def _bias(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return the base layer's output for an input of zeros, which is not scaled."""
        if isinstance(self.base_layer, AdapterLayer):
            zeros: torch.Tensor = self.base_layer(x.new_zeros(1, x.shape[-1]))
            return zeros[0]
        return self.base_layer.bias


class BOFTConv(BOFTLayer, RotatedConv):
    """BOFT over a convolution; ``s`` is (1, out)."""

    def start(self, features: int, name: str, config: BOFTConfig) -> None:
        self.boft_s = nn.Parameter(torch.ones(1, len(base_module(self).weight), **factory_kwargs(self)))
        super().start(features, name, config)


wrap = by_kind({nn.Conv2d: BOFTConv}, otherwise=BOFTLinear)


def block_sizes(features: int, name: str, config: BOFTConfig) -> tuple[int, int]:
    """Return side and number of the blocks of a layer.

    Raises:
        AdapterError: the config's numbers do not divide the inputs.
    """
    given = config.boft_block_size or config.boft_block_num
    key = "boft_block_size" if config.boft_block_size else "boft_block_num"
    if features % given:
        raise AdapterError(f"{given} does not divide {features}, the inputs of {name}", key=key)
    size = config.boft_block_size or features // given
    widest, factors = size * 2 ** (config.boft_n_butterfly_factor - 1), config.boft_n_butterfly_factor
    if features % widest or (factors > 1 and size % 2):
        raise AdapterError(
            f"{factors} factors need blocks of an even side, and {widest} of its {features} inputs "
            f"to come together in {name}: {size} is no such side",
            key="boft_n_butterfly_factor",
        )
    return size, features // size


def _together(rows: torch.Tensor, size: int, blocks: int) -> torch.Tensor:
    """Permute each run of blocks: its first half-block beside the first of its second half, and so on."""
    if blocks == 1:
        return rows
    return rows.unflatten(-1, (-1, 2, blocks, size // 2)).transpose(-3, -2).flatten(-4)


def _apart(rows: torch.Tensor, size: int, blocks: int) -> torch.Tensor:
    """Undo ``_together``."""
    if blocks == 1:
        return rows
    return rows.unflatten(-1, (-1, blocks, 2, size // 2)).transpose(-3, -2).flatten(-4)
