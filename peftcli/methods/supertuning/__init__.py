"""Super-Tuning (https://arxiv.org/abs/2607.09287)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftcli.core.config import TargetedConfig
from peftcli.methods._settings import Problems, not_positive, outside_unit_interval, too_small


@dataclass(kw_only=True)
class SupertuningConfig(TargetedConfig):
    """Settings of Super-Tuning, under PEFT's names."""

    peft_type = "SUPERTUNING"
    learning_rate = 2.5e-3
    always_written: ClassVar[tuple[str, ...]] = ("sparsity", "select_top", "target_modules", "save_precomputed_indices")

    sparsity: float = 0.99
    """Share of a weight's numbers that do not train, in [0, 1). At least one number trains."""
    select_top: bool = True
    """Train the numbers of the largest size; false: those of the smallest."""
    r: int | None = None
    """Train a LoRA of this r beside them (Supra). Unset: none."""
    lora_alpha: float | None = None
    """Strength of the LoRA: it is multiplied by lora_alpha / r. Unset: by 2."""
    lora_dropout: float = 0.0
    """Share of the input values that the LoRA does not see during training."""
    init_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""
    save_precomputed_indices: bool = True
    """Write the numbers' places too: a file of twice the size that does not depend on finding the same ones again in
    the base weight, where some may be equally large."""

    def problems(self) -> Problems:
        found = super().problems() + outside_unit_interval(self, "sparsity", "lora_dropout")
        found += too_small(self, r=1) + not_positive(self, "lora_alpha")
        if self.lora_alpha is not None and self.r is None:
            found.append(("lora_alpha", "means nothing without r"))
        return found
