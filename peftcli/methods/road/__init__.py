"""RoAd: 3-in-1: 2D Rotary Adaptation (https://arxiv.org/abs/2409.00119)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from peftcli.core.config import TargetedConfig
from peftcli.methods._settings import Problems


@dataclass(kw_only=True)
class RoadConfig(TargetedConfig):
    """Settings of RoAd, under PEFT's names."""

    peft_type = "ROAD"
    learning_rate = 5e-3
    sizes: ClassVar[tuple[str, ...]] = ("group_size",)
    always_written: ClassVar[tuple[str, ...]] = ("variant", "group_size", "target_modules")

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    """How freely each pair of a layer's outputs is turned. road_1: by one angle and one scale; road_2: each of the
    two by its own; road_4: by four of each. So many parameters an output, about."""
    group_size: int = 64
    """Outputs are paired across the halves of groups of this size, which divides the outputs of every adapted layer.
    It changes nothing but the speed of some readers, vLLM for one, which like 32 or more."""
    init_weights: bool = True
    """Start from no rotation; false starts at random, for tests."""

    def problems(self) -> Problems:
        found = super().problems()
        if self.group_size < 2 or self.group_size % 2:
            found.append(("group_size", f"must be even and at least 2, not {self.group_size}"))
        return found
