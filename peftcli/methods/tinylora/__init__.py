"""TinyLoRA: Learning to Reason in 13 Parameters (https://arxiv.org/abs/2602.04118)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from peftcli.core.config import BiasConfig, FanInConfig, LayeredConfig
from peftcli.guard.ranges import ABOVE_0, AT_LEAST_1, FRACTION, SHARE


@dataclass(kw_only=True)
class TinyLoraConfig(BiasConfig, FanInConfig, LayeredConfig):
    """Settings of TinyLoRA, under PEFT's names.

    A layer has few numbers, so it learns slowly, whatever the learning rate: in the 60 steps of docs/learning_rates.md
    the loss fell by 7 %.
    """

    peft_type = "TINYLORA"
    learning_rate = 5e-3
    sizes: ClassVar[tuple[str, ...]] = ("r", "u")
    always_written: ClassVar[tuple[str, ...]] = (
        "r", "u", "weight_tying", "target_modules", "projection_seed", "save_projection",
    )  # fmt: skip

    r: int = field(default=2, metadata=AT_LEAST_1)
    """How many of a weight's principal directions are mixed. It costs no trained numbers."""
    u: int = field(default=64, metadata=AT_LEAST_1)
    """Trained numbers in each layer, or in each group of layers that weight_tying makes."""
    weight_tying: float = field(default=0.0, metadata=FRACTION)
    """How much layers share their numbers, from 0, each has its own, to 1, all have the same."""
    projection_seed: int = 42
    """Seed of the random matrices that turn the trained numbers into a mixture."""
    save_projection: bool = True
    """Write the random matrices to the file too: it is larger, and does not depend on the random generator."""
    init_v_bound: float = field(default=0.02, metadata=ABOVE_0)
    """With init_weights: uniform, the trained numbers start between plus and minus this."""
    tinylora_dropout: float = field(default=0.0, metadata=SHARE)
    """Share of the input values that the update does not see during training."""
    init_weights: bool | Literal["uniform"] = True
    """true: start from no update at all; uniform and false: at random."""
