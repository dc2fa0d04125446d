"""LN tuning: Tuning LayerNorm in Attention (https://arxiv.org/abs/2312.11420)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftcli.core.config import ExcludingConfig
from peftcli.methods._settings import Problems


@dataclass(kw_only=True)
class LNTuningConfig(ExcludingConfig):
    """Settings of LN tuning, under PEFT's names. Its target_modules are the norms to train, by default all of them."""

    peft_type = "LN_TUNING"
    learning_rate = 5e-3
    adapts_attention: ClassVar[bool] = True
    as_sets: ClassVar[tuple[str, ...]] = ()
    always_written: ClassVar[tuple[str, ...]] = ("target_modules",)

    def problems(self) -> Problems:
        found = super().problems()
        if self.target_modules == "all-linear":
            found.append(("target_modules", "all-linear names no norm"))
        return found
