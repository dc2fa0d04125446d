"""TinyLoRA: Learning to Reason in 13 Parameters (https://arxiv.org/abs/2602.04118)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from peftcli.core.config import BiasConfig, FanInConfig, LayeredConfig
from peftcli.methods._settings import Problems, not_positive, outside_unit_interval, too_small


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

    r: int = 2
    """How many of a weight's principal directions are mixed. It costs no trained numbers."""
    u: int = 64
    """Trained numbers in each layer, or in each group of layers that weight_tying makes."""
    weight_tying: float = 0.0
    """How much layers share their numbers, from 0, each has its own, to 1, all have the same."""
    projection_seed: int = 42
    """Seed of the random matrices that turn the trained numbers into a mixture."""
    save_projection: bool = True
    """Write the random matrices to the file too: it is larger, and does not depend on the random generator."""
    init_v_bound: float = 0.02
    """With init_weights: uniform, the trained numbers start between plus and minus this."""
    tinylora_dropout: float = 0.0
    """Share of the input values that the update does not see during training."""
    init_weights: bool | Literal["uniform"] = True
    """true: start from no update at all; uniform and false: at random."""

    def problems(self) -> Problems:
        found = super().problems() + too_small(self, r=1, u=1) + outside_unit_interval(self, "tinylora_dropout")
        found += not_positive(self, "init_v_bound")
        if not 0 <= self.weight_tying <= 1:
            found.append(("weight_tying", f"must be in [0, 1], not {self.weight_tying}"))
        return found
