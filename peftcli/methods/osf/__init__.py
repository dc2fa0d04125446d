"""OSF: Orthogonal Subspace Fine-Tuning, sculpting subspaces (https://arxiv.org/abs/2504.07097)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peftcli.core.config import UNSUPPORTED, TargetedConfig
from peftcli.guard.ranges import ABOVE_0


@dataclass(kw_only=True)
class OSFConfig(TargetedConfig):
    """Settings of OSF, under PEFT's names."""

    peft_type = "OSF"
    learning_rate = 1e-4
    as_sets: ClassVar[tuple[str, ...]] = ()
    sizes: ClassVar[tuple[str, ...]] = ("effective_rank", "rank_pattern")
    always_written: ClassVar[tuple[str, ...]] = ("target_modules", "effective_rank")

    effective_rank: int | float | None = field(default=None, metadata=ABOVE_0)
    """How many of a weight's singular directions, the strongest, stay as they are: a number, or below or at 1.0 the
    share of them. The others are trained. Unset: half."""
    rank_pattern: dict[str, int | float] = field(default_factory=dict, metadata=ABOVE_0)
    """An effective_rank of their own for some layers: part of the name or regular expression -> effective_rank."""
    init_weights: bool = True
    """Start from the base model's weights; false starts at random, for tests."""
    target_svd_config: dict[str, int] | None = field(default=None, metadata=UNSUPPORTED)
    """Not supported: rank_pattern says the same."""

    def anywhere(self) -> dict[str, float]:
        """``rank_pattern`` as patterns that match where PEFT's do: anywhere in a name."""
        return {f".*(?:{key}).*": value for key, value in self.rank_pattern.items()}
