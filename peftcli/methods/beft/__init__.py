"""BEFT: Bias-Efficient Fine-Tuning (https://arxiv.org/abs/2509.15974)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peftcli.core.config import TargetedConfig


@dataclass(kw_only=True)
class BeftConfig(TargetedConfig):
    """Settings of BEFT, under PEFT's names."""

    peft_type = "BEFT"
    learning_rate = 1e-2
    always_written: ClassVar[tuple[str, ...]] = ("target_modules",)

    init_weights: bool = True
    """Start from a bias of zero; false starts at random, for tests."""
    without_bias: str | None = field(default=None, metadata={"recipe": False, "file": False})
    """Name of an adapted layer that has no bias to merge into, once the adapter is in a model."""

    def merge_problem(self) -> str | None:
        return self.without_bias and f"BEFT cannot be merged here: {self.without_bias} has no bias in the base model"
