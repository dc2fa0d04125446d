"""LoHa: FedPara: Low-Rank Hadamard Product (https://arxiv.org/abs/2108.06098), and the settings that LoKr shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peftcli.core.config import ExcludingConfig, LayeredConfig
from peftcli.methods._settings import Problems, not_positive, outside_unit_interval, too_small


@dataclass(kw_only=True)
class LycorisConfig(ExcludingConfig, LayeredConfig):
    """Settings of LoHa and LoKr, under PEFT's names."""

    always_written: ClassVar[tuple[str, ...]] = ("r", "alpha", "target_modules")

    r: int = 8
    """Inner size of the products that the delta is made of. Parameters grow linearly with it."""
    alpha: float = 8
    """Strength of the update: it is multiplied by alpha / r."""
    rank_dropout: float = 0.0
    """Share of the outputs that get no update in a step of training."""
    module_dropout: float = 0.0
    """Share of the adapted layers that get no update in a step of training."""
    use_effective_conv2d: bool = False
    """Take a convolution's kernel apart along its window too: fewer parameters for windows above 1."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """An r of their own for some layers: name ending or regular expression -> r."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """An alpha of their own for some layers: name ending or regular expression -> alpha."""

    def problems(self) -> Problems:
        found = super().problems() + too_small(self, r=1, rank_pattern=1)
        found += not_positive(self, "alpha", "alpha_pattern")
        return found + outside_unit_interval(self, "rank_dropout", "module_dropout")


@dataclass(kw_only=True)
class LoHaConfig(LycorisConfig):
    """Settings of LoHa, under PEFT's names."""

    peft_type = "LOHA"
    learning_rate = 5e-3

    init_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""
