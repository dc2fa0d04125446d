"""Trainable tokens: some rows of an embedding are trained, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peftcli.core.config import BOOKKEEPING, TargetedConfig
from peftcli.methods._settings import Problems


@dataclass(kw_only=True)
class TrainableTokensConfig(TargetedConfig):
    """Settings of trainable tokens, under PEFT's names. The target_modules are by default the input embedding.

    Only texts with these tokens teach anything: with two ends of chat turns, the loss of plain texts fell by 6 % in
    the 60 steps of docs/learning_rates.md.
    """

    peft_type = "TRAINABLE_TOKENS"
    learning_rate = 1e-2
    as_sets: ClassVar[tuple[str, ...]] = ()
    filled_later: ClassVar[tuple[str, ...]] = ("token_indices",)
    always_written: ClassVar[tuple[str, ...]] = ("target_modules", "token_indices")
    unknown_to_peft: ClassVar[tuple[str, ...]] = ("modules_to_save",)

    token_indices: list[int] = field(default_factory=list)
    """Ids of the tokens to train. Each costs as many parameters as the embedding is wide."""
    init_weights: bool = True
    """Start from the base model's rows; false starts at random."""
    tied: bool = field(default=True, metadata={**BOOKKEEPING, "file": False}, repr=False, compare=False)
    """Whether layers that share a weight share the rows. PEFT's file may hold those of an encoder's embedding alone."""

    def problems(self) -> Problems:
        found = super().problems()
        if not self.token_indices:
            found.append(("token_indices", "names no token"))
        found += [("token_indices", f"ids count from 0, not {token}") for token in self.token_indices if token < 0]
        if self.target_modules == "all-linear":
            found.append(("target_modules", "all-linear names no embedding"))
        return found
