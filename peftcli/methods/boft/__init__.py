"""BOFT: Orthogonal Finetuning via Butterfly Factorization (https://arxiv.org/abs/2311.06243)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftcli.core.config import BiasConfig, ExcludingConfig, FanInConfig, LayeredConfig
from peftcli.methods._settings import Problems, outside_unit_interval, too_large, too_small


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

    boft_block_size: int = 4
    """Side of the blocks that each factor rotates, which divides the inputs of every adapted layer; 0: as
    boft_block_num says. Parameters grow linearly with it."""
    boft_block_num: int = 0
    """Number of blocks that the inputs of a layer are cut into; 0: as boft_block_size says."""
    boft_n_butterfly_factor: int = 1
    """Number of factors, each of which rotates other inputs together. 1 rotates within the blocks only; each more
    doubles how many inputs come together, and adds as many parameters."""
    boft_dropout: float = 0.0
    """Share of the blocks that are not rotated in a step of training."""
    init_weights: bool = True
    """Start from no rotation; false starts at random, for tests."""

    def problems(self) -> Problems:
        found = super().problems() + outside_unit_interval(self, "boft_dropout")
        found += too_small(self, boft_block_size=0, boft_block_num=0, boft_n_butterfly_factor=1)
        found += too_large(self, boft_n_butterfly_factor=62)
        if (self.boft_block_size == 0) == (self.boft_block_num == 0):
            found.append(("boft_block_size", "give either boft_block_size or boft_block_num, and 0 for the other"))
        return found
