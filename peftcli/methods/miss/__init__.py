"""MiSS: Matrix Shard Sharing, once called Bone (https://arxiv.org/abs/2409.15371)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from peftcli.core.config import BiasConfig, ExcludingConfig, LayeredConfig
from peftcli.guard.ranges import AT_LEAST_1, SHARE


@dataclass(kw_only=True)
class MissConfig(BiasConfig, ExcludingConfig, LayeredConfig):
    """Settings of MiSS, under PEFT's names."""

    peft_type = "MISS"
    learning_rate = 2e-4
    sizes: ClassVar[tuple[str, ...]] = ("r", "mini_r")
    always_written: ClassVar[tuple[str, ...]] = ("r", "target_modules", "init_weights", "mini_r")

    r: int = field(default=64, metadata=AT_LEAST_1)
    """Rows of the block that is repeated along a layer's inputs. Parameters grow linearly with it."""
    mini_r: int = field(default=1, metadata=AT_LEAST_1)
    """With init_weights: mini, the block's columns; it divides a layer's outputs."""
    miss_dropout: float = field(default=0.0, metadata=SHARE)
    """Share of the input values that the update does not see during training. bat has none."""
    init_weights: bool | Literal["bat", "mini"] = True
    """Which MiSS it is. true: one block for all inputs, which starts at zero; bat: an update that depends on the base
    weight, better and slower; mini: a block that is repeated along the outputs too, far smaller; false: as true, but
    started at random, for tests."""
