"""Super-Tuning (https://arxiv.org/abs/2607.09287)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peftcli.core.config import TargetedConfig
from peftcli.guard.ranges import ABOVE_0, AT_LEAST_1, SHARE
from peftcli.methods._settings import Problems


@dataclass(kw_only=True)
class SupertuningConfig(TargetedConfig):
    """Settings of Super-Tuning, under PEFT's names."""

    peft_type = "SUPERTUNING"
    learning_rate = 2.5e-3
    always_written: ClassVar[tuple[str, ...]] = ("sparsity", "select_top", "target_modules", "save_precomputed_indices")

    sparsity: float = field(default=0.99, metadata=SHARE)
    """Share of a weight's numbers that do not train, in [0, 1). At least one number trains."""
    select_top: bool = True
    """Train the numbers of the largest size; false: those of the smallest."""
    r: int | None = field(default=None, metadata=AT_LEAST_1)
    """Train a LoRA of this r beside them (Supra). Unset: none."""
    lora_alpha: float | None = field(default=None, metadata=ABOVE_0)
    """Strength of the LoRA: it is multiplied by lora_alpha / r. Unset: by 2."""
    lora_dropout: float = field(default=0.0, metadata=SHARE)
    """Share of the input values that the LoRA does not see during training."""
    init_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""
    save_precomputed_indices: bool = True
    """Write the numbers' places too: a file of twice the size that does not depend on finding the same ones again in
    the base weight, where some may be equally large."""

    def problems(self) -> Problems:
        found = super().problems()
        if self.lora_alpha is not None and self.r is None:
            found.append(("lora_alpha", "means nothing without r"))
        return found
