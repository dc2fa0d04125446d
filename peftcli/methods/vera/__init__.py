"""VeRA: Vector-based Random Matrix Adaptation (https://arxiv.org/abs/2310.11454)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peftcli.core.config import BiasConfig, FanInConfig, LayeredConfig
from peftcli.guard.ranges import AT_LEAST_1, SHARE
from peftcli.methods._settings import Problems


@dataclass(kw_only=True)
class VeraConfig(BiasConfig, FanInConfig, LayeredConfig):
    """Settings of VeRA, under PEFT's names."""

    peft_type = "VERA"
    learning_rate = 1e-2
    always_written: ClassVar[tuple[str, ...]] = ("r", "target_modules", "projection_prng_key", "save_projection")

    r: int = field(default=256, metadata=AT_LEAST_1)
    """Size of the bottleneck. It costs one trained number a layer each, so it is larger than LoRA's."""
    projection_prng_key: int = 0
    """Seed of the two random matrices that all layers share."""
    save_projection: bool = True
    """Write the random matrices to the file too: it is larger, and does not depend on the random generator."""
    vera_dropout: float = field(default=0.0, metadata=SHARE)
    """Share of the input values that the update does not see during training."""
    d_initial: float = 0.1
    """Where the vector between the two matrices starts."""
    init_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""

    def problems(self) -> Problems:
        found = super().problems()
        if self.d_initial == 0 and self.init_weights and not self.inference_mode:
            found.append(("d_initial", "must not be 0: both vectors would start at 0, where neither can train"))
        return found
