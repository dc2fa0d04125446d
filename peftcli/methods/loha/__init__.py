"""LoHa: FedPara: Low-Rank Hadamard Product (https://arxiv.org/abs/2108.06098), and the settings that LoKr shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peftcli.core.config import ExcludingConfig, LayeredConfig
from peftcli.guard.ranges import ABOVE_0, AT_LEAST_1, SHARE


@dataclass(kw_only=True)
class LycorisConfig(ExcludingConfig, LayeredConfig):
    """Settings of LoHa and LoKr, under PEFT's names."""

    always_written: ClassVar[tuple[str, ...]] = ("r", "alpha", "target_modules")

    r: int = field(default=8, metadata=AT_LEAST_1)
    """Inner size of the products that the delta is made of. Parameters grow linearly with it."""
    alpha: float = field(default=8, metadata=ABOVE_0)
    """Strength of the update: it is multiplied by alpha / r."""
    rank_dropout: float = field(default=0.0, metadata=SHARE)
    """Share of the outputs that get no update in a step of training."""
    module_dropout: float = field(default=0.0, metadata=SHARE)
    """Share of the adapted layers that get no update in a step of training."""
    use_effective_conv2d: bool = False
    """Take a convolution's kernel apart along its window too: fewer parameters for windows above 1."""
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata=AT_LEAST_1)
    """An r of their own for some layers: name ending or regular expression -> r."""
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata=ABOVE_0)
    """An alpha of their own for some layers: name ending or regular expression -> alpha."""


@dataclass(kw_only=True)
class LoHaConfig(LycorisConfig):
    """Settings of LoHa, under PEFT's names."""

    peft_type = "LOHA"
    learning_rate = 5e-3

    init_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""
