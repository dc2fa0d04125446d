"""BOFT: Orthogonal Finetuning via Butterfly Factorization (https://arxiv.org/abs/2311.06243)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peftcli.core.config import BiasConfig, ExcludingConfig, FanInConfig, LayeredConfig
from peftcli.guard.ranges import AT_LEAST_0, AT_LEAST_1, SHARE
from peftcli.methods._settings import Problems


@dataclass(kw_only=True)
class BOFTConfig(BiasConfig, FanInConfig, ExcludingConfig, LayeredConfig):
    """Settings of BOFT, under PEFT's names."""

    peft_type = "BOFT"
    learning_rate = 2e-3
    sizes: ClassVar[tuple[str, ...]] = ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor")
    always_written: ClassVar[tuple[str, ...]] = (
        "boft_block_size",
        "boft_block_num",
        "boft_n_butterfly_factor",
        "target_modules",
        "bias",
    )

    boft_block_size: int = field(default=4, metadata=AT_LEAST_0)
    """Side of the blocks that each factor rotates, which divides the inputs of every adapted layer; 0: as
    boft_block_num says. Parameters grow linearly with it."""
    boft_block_num: int = field(default=0, metadata=AT_LEAST_0)
    """Number of blocks that the inputs of a layer are cut into; 0: as boft_block_size says."""
    boft_n_butterfly_factor: int = field(default=1, metadata=AT_LEAST_1 | {"most": 62})
    """Number of factors, each of which rotates other inputs together. 1 rotates within the blocks only; each more
    doubles how many inputs come together, and adds as many parameters."""
    boft_dropout: float = field(default=0.0, metadata=SHARE)
    """Share of the blocks that are not rotated in a step of training."""
    init_weights: bool = True
    """Start from no rotation; false starts at random, for tests."""

    def problems(self) -> Problems:
        found = super().problems()
        if (self.boft_block_size == 0) == (self.boft_block_num == 0):
            found.append(("boft_block_size", "give either boft_block_size or boft_block_num, and 0 for the other"))
        return found
