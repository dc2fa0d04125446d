"""DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation (https://arxiv.org/abs/2503.18225)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peftcli.core.config import BiasConfig, ExcludingConfig, LayeredConfig
from peftcli.guard.ranges import AT_LEAST_1, SHARE
from peftcli.methods._settings import ZERO, Problems


@dataclass(kw_only=True)
class DeloraConfig(BiasConfig, ExcludingConfig, LayeredConfig):
    """Settings of DeLoRA, under PEFT's names."""

    peft_type = "DELORA"
    learning_rate = 1e-3
    always_written: ClassVar[tuple[str, ...]] = ("r", "delora_lambda", "target_modules")

    r: int = field(default=8, metadata=AT_LEAST_1)
    """Size of the bottleneck. Parameters and memory grow linearly with it."""
    delora_lambda: float = 15
    """Where the bound on the size of the update starts; it is trained."""
    module_dropout: float = field(default=0.0, metadata=SHARE)
    """Share of the input values that the update does not see during training."""
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata=AT_LEAST_1)
    """An r of their own for some layers: name ending or regular expression -> r."""
    lambda_pattern: dict[str, float] = field(default_factory=dict)
    """A delora_lambda of their own for some layers: name ending or regular expression -> delora_lambda."""
    init_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""

    def problems(self) -> Problems:
        found = super().problems()
        if self.init_weights and not self.inference_mode:  # else B is not zero, and lambda leaves 0
            found += [("delora_lambda", ZERO)] * (self.delora_lambda == 0)
            found += [
                ("lambda_pattern", f"{name}: {ZERO}") for name, value in self.lambda_pattern.items() if value == 0
            ]
        return found
