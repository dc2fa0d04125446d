"""Lily: Low-Rank Interconnected Adaptation across Layers (https://arxiv.org/abs/2407.09946)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peftcli.core.config import ExcludingConfig, LayeredConfig
from peftcli.guard.ranges import ABOVE_0, AT_LEAST_1


@dataclass(kw_only=True)
class LilyConfig(ExcludingConfig, LayeredConfig):
    """Settings of Lily, under PEFT's names."""

    peft_type = "LILY"
    learning_rate = 1e-3
    sizes: ClassVar[tuple[str, ...]] = ("r", "stride_A", "num_B")
    always_written: ClassVar[tuple[str, ...]] = ("r", "stride_A", "num_B", "scaling", "target_modules")

    r: int = field(default=32, metadata=AT_LEAST_1)
    """Size of the bottleneck. There are fewer matrices than in LoRA, so it is 2 to 4 times LoRA's."""
    stride_A: int = field(default=1, metadata=AT_LEAST_1)
    """So many layers after one another share the matrix before the bottleneck, each kind of module for itself."""
    num_B: int = field(default=2, metadata={"least": 2})
    """Matrices after the bottleneck that all layers share, each kind of module for itself; every layer mixes them as
    its input asks. At least 2; a half to a quarter of the model's layers."""
    scaling: float = field(default=1.0, metadata=ABOVE_0)
    """What the update is multiplied by."""
    init_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""

    def packing_problem(self) -> str | None:
        return "mixes its parts by the mean over all tokens of a batch"

    def reads_batches(self) -> bool:
        return True

    def merge_problem(self) -> str | None:
        return "Lily's update depends on the input, so it cannot be merged into a weight"
