"""GLoRA: One-for-All: Generalized LoRA (https://arxiv.org/abs/2306.07967)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from peftcli.core.config import BiasConfig
from peftcli.guard.ranges import AT_LEAST_1
from peftcli.methods._settings import Problems


@dataclass(kw_only=True)
class GloraConfig(BiasConfig):
    """Settings of GLoRA, under PEFT's names. A layer becomes ``(W + W * A + B) x + b + b * D + E + W C``."""

    peft_type = "GLORA"
    learning_rate = 5e-4
    always_written: ClassVar[tuple[str, ...]] = ("r", "target_modules", "config_A_B", "config_C", "config_D_E")

    r: int = field(default=8, metadata=AT_LEAST_1)
    """Inner size of the products among A, B and C."""
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"
    """What A and B are. lora: a product of two thin matrices each; vector: a number for each output;
    constant: one number; none: nothing."""
    config_C: Literal["lora", "vector", "none"] = "lora"
    """What C is, in layers with a bias. lora: a product; vector: a number for each input; none: nothing."""
    config_D_E: Literal["vector", "constant", "none"] = "constant"
    """What D and E are, there. vector: a number for each output; constant: one number; none: nothing."""
    init_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""

    def problems(self) -> Problems:
        found = super().problems()
        if self.config_A_B == self.config_C == self.config_D_E == "none":
            found.append(("config_A_B", "with config_C and config_D_E none too, there is nothing to train"))
        return found
