"""GraLoRA: Granular Low-Rank Adaptation (https://arxiv.org/abs/2505.20355)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftcli.core.config import BiasConfig, FanInConfig, LayeredConfig
from peftcli.methods._settings import Problems, not_positive, outside_unit_interval, too_small


@dataclass(kw_only=True)
class GraloraConfig(BiasConfig, FanInConfig, LayeredConfig):
    """Settings of GraLoRA, under PEFT's names."""

    peft_type = "GRALORA"
    learning_rate = 5e-4
    sizes: ClassVar[tuple[str, ...]] = ("r", "hybrid_r", "gralora_k")
    always_written: ClassVar[tuple[str, ...]] = ("r", "alpha", "gralora_k", "target_modules")

    r: int = 32
    """Size of the bottleneck of all blocks together. Parameters are those of LoRA with this r."""
    hybrid_r: int = 0
    """Size of the bottleneck of a plain LoRA beside the blocks, which comes on top; 0: none."""
    alpha: float = 64
    """Strength of the update: it is multiplied by alpha / (r + hybrid_r)."""
    gralora_k: int = 2
    """Each weight is cut into k by k blocks with a LoRA each. It divides r and the sides of every adapted layer;
    2 for an r up to 32, 4 for 64 and above."""
    gralora_dropout: float = 0.0
    """Share of the input values that the update does not see during training."""
    init_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""

    def problems(self) -> Problems:
        found = super().problems() + too_small(self, r=1, gralora_k=1, hybrid_r=0)
        found += not_positive(self, "alpha") + outside_unit_interval(self, "gralora_dropout")
        if self.gralora_k >= 1 and self.r % self.gralora_k:
            found.append(("gralora_k", f"{self.gralora_k} does not divide r, {self.r}"))
        return found
