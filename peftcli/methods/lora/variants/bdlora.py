"""BD-LoRA: LoRA with block-diagonal A or B, which servers split without communication (https://arxiv.org/abs/2510.23346)."""

from __future__ import annotations

import torch
from torch import nn

from peftcli.errors import AdapterError
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.lora import LoraLinear
from peftcli.methods.lora.variants import BdLoraConfig

_KEY = "use_bdlora"


class BlockDiagonal(nn.Module):
    """A linear map of n blocks along the diagonal, stored one below the other: ``weight: (out, in / n)``."""

    def __init__(self, linear: nn.Linear, blocks: int, name: str):
        super().__init__()
        inputs, out, like = linear.in_features, linear.out_features, linear.weight
        if inputs % blocks or out % blocks:
            raise AdapterError(f"{blocks} does not divide {name}'s {inputs} and {out}", key=f"{_KEY}.nblocks")
        self.blocks = blocks
        self.weight = nn.Parameter(torch.empty(out, inputs // blocks, device=like.device, dtype=like.dtype))
        self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.unflatten(-1, (self.blocks, -1))
        weight = self.weight.unflatten(0, (self.blocks, -1))
        return torch.einsum("...bi,boi->...bo", parts, weight.to(x.dtype)).flatten(-2)


class BdLoraLinear(LoraLinear):
    """A linear layer whose A or B is block-diagonal."""

    def make_pair(self, name: str, config: LoraConfig) -> None:
        super().make_pair(name, config)
        if self.view.transposed:
            raise AdapterError(f"{name} is a Conv1D; BD-LoRA adapts Linear", key=_KEY)
        assert config.use_bdlora
        if (which := diagonal(config.use_bdlora, name)) is not None:
            setattr(self, which, BlockDiagonal(getattr(self, which), config.use_bdlora.nblocks, name))

    def start(self, config: LoraConfig) -> None:
        super().start(config)
        if isinstance(self.lora_A, BlockDiagonal):
            nn.init.kaiming_uniform_(self.lora_A.weight)

    def delta(self) -> torch.Tensor:
        a, b = (
            dense(part.weight, part.blocks) if isinstance(part, BlockDiagonal) else part.weight
            for part in (self.lora_A, self.lora_B)
        )
        return self.view.as_stored(self.scaling * (b @ a))


def diagonal(own: BdLoraConfig, name: str) -> str | None:
    """Return which of ``lora_A`` and ``lora_B`` is block-diagonal in the module ``name``, or None.

    Raises:
        AdapterError: both lists name it; or none does, and ``match_strict`` forbids that.
    """
    lists = {"lora_A": own.target_modules_bd_a, "lora_B": own.target_modules_bd_b}
    found = [which for which, parts in lists.items() if any(part in name for part in parts or ())]
    if len(found) > 1:
        raise AdapterError(f"both lists name {name}; block-diagonal are A or B", key=_KEY)
    if not found and own.match_strict:
        raise AdapterError(
            f"no list names {name}", key=_KEY, hint="set use_bdlora.match_strict: false for a plain LoRA there"
        )
    return next(iter(found), None)


def dense_pair(own: BdLoraConfig, name: str, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of the module ``name`` as matrices, of those in a file."""
    which = diagonal(own, name)
    return dense(a, own.nblocks) if which == "lora_A" else a, dense(b, own.nblocks) if which == "lora_B" else b


def dense(weight: torch.Tensor, blocks: int) -> torch.Tensor:
    """Return the matrix (out, in) whose blocks ``weight`` holds."""
    return torch.block_diag(*weight.chunk(blocks))
