"""HiRA: Parameter-Efficient Hadamard High-Rank Adaptation (https://openreview.net/forum?id=TwJrTz9cRS)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from peftcli.core.config import UNSUPPORTED, ExcludingConfig, FanInConfig, LayeredConfig
from peftcli.guard.ranges import AT_LEAST_1, SHARE


@dataclass(kw_only=True)
class HiraConfig(FanInConfig, ExcludingConfig, LayeredConfig):
    """Settings of HiRA, under PEFT's names."""

    peft_type = "HIRA"
    learning_rate = 5e-3
    always_written: ClassVar[tuple[str, ...]] = ("r", "target_modules")

    r: int = field(default=32, metadata=AT_LEAST_1)
    """Size of the bottleneck. Parameters grow linearly with it; the update has a higher rank."""
    hira_dropout: float = field(default=0.0, metadata=SHARE)
    """Share of the input values that the update does not see during training."""
    init_weights: bool | Literal["gaussian"] = True
    """How A starts; B starts at zero. true: Kaiming uniform; gaussian: normal with deviation 1/r;
    false: B starts random too, for tests."""
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata=UNSUPPORTED)
    """Not supported: it does nothing in PEFT."""
