"""RandLoRA: Full-rank Parameter-efficient Fine-tuning of Large Models (https://arxiv.org/abs/2502.00987)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peftcli.core.config import BiasConfig, FanInConfig, LayeredConfig
from peftcli.guard.ranges import AT_LEAST_1, SHARE
from peftcli.methods._settings import ZERO, Problems


@dataclass(kw_only=True)
class RandLoraConfig(BiasConfig, FanInConfig, LayeredConfig):
    """Settings of RandLoRA, under PEFT's names."""

    peft_type = "RANDLORA"
    learning_rate = 2e-4
    always_written: ClassVar[tuple[str, ...]] = (
        "r", "randlora_alpha", "target_modules", "projection_prng_key", "save_projection",
    )  # fmt: skip

    r: int = field(default=32, metadata=AT_LEAST_1)
    """Size of each random basis. Smaller means more bases, and more trained numbers."""
    randlora_alpha: float = 640
    """Strength of the update: it is multiplied by randlora_alpha / r. About 20 r."""
    projection_prng_key: int = 0
    """Seed of the random bases that all layers share."""
    save_projection: bool = True
    """Write the random bases to the file too: it is larger, and does not depend on the random generator."""
    sparse: bool = False
    """Bases of -1, 0 and 1, of which 2/3 are 0."""
    very_sparse: bool = False
    """Bases of -1, 0 and 1, nearly all of which are 0. Learns less."""
    randlora_dropout: float = field(default=0.0, metadata=SHARE)
    """Share of the input values that the update does not see during training."""
    init_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""

    def problems(self) -> Problems:
        wrong = self.randlora_alpha == 0 and not self.inference_mode
        return super().problems() + [("randlora_alpha", ZERO)] * wrong
