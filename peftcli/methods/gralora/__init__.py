"""GraLoRA: Granular Low-Rank Adaptation (https://arxiv.org/abs/2505.20355)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peftcli.core.config import BiasConfig, FanInConfig, LayeredConfig
from peftcli.guard.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SHARE
from peftcli.methods._settings import Problems


@dataclass(kw_only=True)
class GraloraConfig(BiasConfig, FanInConfig, LayeredConfig):
    """Settings of GraLoRA, under PEFT's names."""

    peft_type = "GRALORA"
    learning_rate = 5e-4
    sizes: ClassVar[tuple[str, ...]] = ("r", "hybrid_r", "gralora_k")
    always_written: ClassVar[tuple[str, ...]] = ("r", "alpha", "gralora_k", "target_modules")

    r: int = field(default=32, metadata=AT_LEAST_1)
    """Size of the bottleneck of all blocks together. Parameters are those of LoRA with this r."""
    hybrid_r: int = field(default=0, metadata=AT_LEAST_0)
    """Size of the bottleneck of a plain LoRA beside the blocks, which comes on top; 0: none."""
    alpha: float = field(default=64, metadata=ABOVE_0)
    """Strength of the update: it is multiplied by alpha / (r + hybrid_r)."""
    gralora_k: int = field(default=2, metadata=AT_LEAST_1)
    """Each weight is cut into k by k blocks with a LoRA each. It divides r and the sides of every adapted layer;
    2 for an r up to 32, 4 for 64 and above."""
    gralora_dropout: float = field(default=0.0, metadata=SHARE)
    """Share of the input values that the update does not see during training."""
    init_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""

    def problems(self) -> Problems:
        found = super().problems()
        if self.gralora_k >= 1 and self.r % self.gralora_k:
            found.append(("gralora_k", f"{self.gralora_k} does not divide r, {self.r}"))
        return found
