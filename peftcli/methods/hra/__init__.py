"""HRA: Householder Reflection Adaptation (https://arxiv.org/abs/2405.17484)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peftcli.core.config import BiasConfig, ExcludingConfig, LayeredConfig
from peftcli.guard.ranges import AT_LEAST_1


@dataclass(kw_only=True)
class HRAConfig(BiasConfig, ExcludingConfig, LayeredConfig):
    """Settings of HRA, under PEFT's names."""

    peft_type = "HRA"
    learning_rate = 1e-3
    always_written: ClassVar[tuple[str, ...]] = ("r", "apply_GS", "target_modules", "bias")

    r: int = field(default=8, metadata=AT_LEAST_1)
    """Number of reflections of a layer's inputs. They start in pairs that undo one another, so an odd number starts
    as a single reflection, not from the base model. Parameters grow linearly with it."""
    apply_GS: bool = False
    """Make the reflections orthogonal to one another. They cannot start in pairs then, so training starts far from
    the base model."""
    init_weights: bool = True
    """Start in pairs; false starts at random, for tests."""
