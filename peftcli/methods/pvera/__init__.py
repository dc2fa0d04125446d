"""PVeRA: Probabilistic Vector-based Random Matrix Adaptation (https://arxiv.org/abs/2512.07703)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peftcli.core.config import BiasConfig, FanInConfig, LayeredConfig
from peftcli.guard.ranges import AT_LEAST_1, SHARE
from peftcli.methods._settings import Problems


@dataclass(kw_only=True)
class PveraConfig(BiasConfig, FanInConfig, LayeredConfig):
    """Settings of PVeRA, under PEFT's names.

    Training draws each update at random, so it learns slowly: in the 60 steps of docs/learning_rates.md the loss fell
    by 9 %.
    """

    peft_type = "PVERA"
    learning_rate = 2e-2
    always_written: ClassVar[tuple[str, ...]] = ("r", "target_modules", "projection_prng_key", "save_projection")

    r: int = field(default=256, metadata=AT_LEAST_1)
    """Size of the bottleneck. It costs two trained numbers a layer each, so it is larger than LoRA's."""
    projection_prng_key: int = 0
    """Seed of the two random matrices that all layers share."""
    save_projection: bool = True
    """Write the random matrices to the file too: it is larger, and does not depend on the random generator."""
    pvera_dropout: float = field(default=0.0, metadata=SHARE)
    """Share of the input values that the update does not see during training."""
    d_initial: float = 0.1
    """Where the vector between the two matrices starts."""
    init_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""
    sample_at_inference: bool = False
    """Draw the values in the bottleneck after training too, which makes every answer another one; false takes their
    mean."""
    generator_seed: int | None = field(default=None, metadata={"recipe": False})
    """PEFT's seed of what is drawn. Here training.seed decides it, so that it is the same with gradient
    checkpointing, which calls a layer twice; kept for the file."""

    def problems(self) -> Problems:
        found = super().problems()
        if self.generator_seed is not None and not self.inference_mode:
            found.append(("generator_seed", "is not used in training; set the run's seed"))
        return found

    def merge_problem(self) -> str | None:
        return "with sample_at_inference the update is drawn anew each time" if self.sample_at_inference else None
