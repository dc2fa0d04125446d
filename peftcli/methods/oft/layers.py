"""The layers of OFT (https://arxiv.org/abs/2306.07280)."""

from __future__ import annotations

import math

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer, base_module, widened
from peftcli.methods._delta import by_kind, factory_kwargs
from peftcli.methods._rotation import RotatedConv, RotatedLinear, Rotating, cayley, leave_out, neumann, skew_of
from peftcli.methods.oft import OFTConfig


class Rotation(nn.Module):
    """A block-diagonal rotation: each block ``(k, k)`` is made of the ``k (k - 1) / 2`` numbers of a skew ``S``.

    ``R = (I - S) (I + S)^-1`` by Cayley, or ``R = I + 2 S + 2 S^2 + ...``, which is the inverse of that.
    """

    def __init__(self, features: int, config: OFTConfig, like: dict[str, object]):
        super().__init__()
        given = config.oft_block_size or config.r
        divisors = [divisor for divisor in range(1, features + 1) if features % divisor == 0]
        divisor = min(divisors, key=lambda divisor: abs(divisor - given))  # the nearest, of two the lower one
        self.size = divisor if config.oft_block_size else features // divisor
        self.count = features // self.size
        self.config = config
        shape = (1 if config.block_share else self.count, self.size * (self.size - 1) // 2)
        self.weight = nn.Parameter(torch.zeros(shape, **like))  # type: ignore[call-overload]
        if not config.init_weights:
            nn.init.normal_(self.weight, std=0.1)

    def forward(self, rows: torch.Tensor, back: bool) -> torch.Tensor:
        """Each of the rows (..., in) rotated, or rotated back. While it trains, coft brings its numbers back first."""
        if self.config.coft and self.training and torch.is_grad_enabled():
            self.bring_back()
        blocks = self.blocks().mT if back else self.blocks()
        pieces = rows.unflatten(-1, (self.count, self.size))
        return torch.einsum("...nk,nkj->...nj", pieces, blocks.expand(self.count, -1, -1)).flatten(-2)

    def blocks(self) -> torch.Tensor:
        """The blocks that the input's rows are multiplied by: (n, k, k), or (1, k, k) when all are one."""
        skew = skew_of(widened(self.weight * self.room() if self.config.coft else self.weight), self.size)
        terms = self.config.num_cayley_neumann_terms
        blocks = neumann(skew, terms) if self.config.use_cayley_neumann else cayley(skew)
        if self.training and self.config.module_dropout:
            blocks = leave_out(blocks.expand(self.count, -1, -1), self.config.module_dropout)
        return blocks

    def room(self) -> torch.Tensor:
        """With coft, what each block's numbers are multiplied by to come no further than eps: (n, 1)."""
        furthest = self.config.eps / math.sqrt(len(self.weight))
        length = math.sqrt(2) * self.weight.detach().norm(dim=1, keepdim=True)  # of S, which has each number twice
        return (furthest / length).clamp(max=1)

    @torch.no_grad()
    def bring_back(self) -> None:
        """With coft, move the numbers to where they may be."""
        self.weight.mul_(self.room())


class OFTLayer(Rotating):
    """A layer with the rotation ``oft_R``, which starts as the identity."""

    method = "OFT"
    oft_R: Rotation

    def start(self, features: int, name: str, config: OFTConfig) -> None:
        self.oft_R = Rotation(features, config, factory_kwargs(self))

    def rotated(self, rows: torch.Tensor, back: bool = False) -> torch.Tensor:
        return self.oft_R(rows, back)


class OFTLinear(OFTLayer, RotatedLinear):
    """OFT over a linear layer."""


class OFTConv(OFTLayer, RotatedConv):
    """OFT over a convolution."""


class OFTEmbedding(AdapterLayer):
    """OFT over an embedding: what is looked up is rotated."""

    def __init__(self, module: nn.Module, name: str, config: OFTConfig):
        super().__init__(module)
        self.oft_embedding_R = Rotation(base_module(module).weight.shape[1], config, factory_kwargs(self))

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.oft_embedding_R(widened(y), False).to(y.dtype)

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"weight": self.oft_embedding_R(widened(base["weight"]), False)}


wrap = by_kind({nn.Conv2d: OFTConv, nn.Embedding: OFTEmbedding}, otherwise=OFTLinear)


def after_step(model: nn.Module, config: OFTConfig, step: int, total: int) -> None:
    """Bring the blocks of the layers with coft back to where they may be."""
    for module in model.modules():
        if isinstance(module, Rotation) and module.config.coft:
            module.bring_back()
