"""(IA)^3: Few-Shot Parameter-Efficient Fine-Tuning (https://arxiv.org/abs/2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftcli.core.config import ExcludingConfig, FanInConfig
from peftcli.methods._settings import Problems


@dataclass(kw_only=True)
class IA3Config(FanInConfig, ExcludingConfig):
    """Settings of (IA)^3, under PEFT's names."""

    peft_type = "IA3"
    learning_rate = 1e-2
    as_sets: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules", "feedforward_modules")
    always_written: ClassVar[tuple[str, ...]] = ("target_modules", "feedforward_modules")

    feedforward_modules: list[str] | str | None = None
    """Which of the adapted modules have their inputs scaled, not their outputs, written as target_modules are.
    Unset: the second layer of the MLP, for the families that we know."""
    init_ia3_weights: bool = True
    """Start from factors of one; false starts at random, for tests."""

    def problems(self) -> Problems:
        found = super().problems()
        if isinstance(self.target_modules, set) and isinstance(self.feedforward_modules, set):
            strange = sorted(self.feedforward_modules - self.target_modules)
            found += [("feedforward_modules", f"{name!r} is not in target_modules") for name in strange[:1]]
        return found
