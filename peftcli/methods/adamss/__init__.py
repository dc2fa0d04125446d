"""AdaMSS: Adaptive Multi-Subspace Approach for Fine-Tuning (https://neurips.cc/virtual/2025/poster/119606)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peftcli.core.config import LayeredConfig
from peftcli.errors import AdapterError
from peftcli.guard.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SHARE
from peftcli.methods._settings import Problems

_OF_ASA = (
    "asa_target_subspaces", "init_warmup", "mask_interval",
    "asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent",
)  # fmt: skip
"""Settings that mean nothing without use_asa."""


@dataclass(kw_only=True)
class AdamssConfig(LayeredConfig):
    """Settings of AdaMSS, under PEFT's names."""

    peft_type = "ADAMSS"
    learning_rate = 5e-3
    sizes: ClassVar[tuple[str, ...]] = ()  # a layer's own sizes are the limit of each
    always_written: ClassVar[tuple[str, ...]] = ("r", "num_subspaces", "subspace_rank", "target_modules", "random_seed")

    r: int = field(default=100, metadata=AT_LEAST_1)
    """How many of a weight's singular directions the update reads its input through."""
    num_subspaces: int = field(default=5, metadata=AT_LEAST_1)
    """Into how many groups a layer's outputs are divided. Each has an update of its own."""
    subspace_rank: int = field(default=1, metadata=AT_LEAST_1)
    """Size of each group's bottleneck. A layer has subspace_rank * (num_subspaces * r + outputs) trained numbers."""
    init_weights: Literal["orthogonal", False] | None = "orthogonal"
    """orthogonal: start from no update at all; false: at random, for tests."""
    use_asa: bool = False
    """Freeze the least important groups while training, until asa_target_subspaces are left."""
    asa_target_subspaces: int = field(default=50, metadata=AT_LEAST_1)
    """How many groups of the whole model still train at the end. Where it has no more of them, none is frozen."""
    init_warmup: int = field(default=50, metadata=AT_LEAST_0)
    """Step from which groups may be frozen."""
    final_warmup: int = 1000
    """Step from which on no more than asa_target_subspaces train."""
    mask_interval: int = field(default=100, metadata=AT_LEAST_1)
    """Number of steps between two times that groups are frozen; the last time is at final_warmup."""
    asa_importance_beta: float = field(default=0.85, metadata=SHARE)
    """How slowly the importance of a weight follows its last steps; nearer to 1 is slower."""
    asa_uncertainty_beta: float = field(default=0.85, metadata=SHARE)
    """The same for how much that importance varies."""
    asa_schedule_exponent: float = field(default=3.0, metadata=ABOVE_0)
    """How early groups are frozen: 1 is evenly, more is earlier."""
    use_dynamic_rank: bool = False
    """Give a group a bottleneck below subspace_rank where its directions are few."""
    svd_threshold: float = field(default=0.1, metadata=SHARE)
    """With use_dynamic_rank: a direction counts from this share of the group's strongest one on."""
    random_seed: int = 0
    """Seed of the decomposition, which starts from a random matrix."""

    def normalise(self) -> None:
        super().normalise()
        if self.init_weights is False:
            self.init_weights = None

    def problems(self) -> Problems:
        found = super().problems()
        if not self.use_asa:
            return [(key, message) for key, message in found if key not in _OF_ASA]
        if self.init_warmup >= self.final_warmup:
            found.append(("init_warmup", f"{self.init_warmup} is not below final_warmup, {self.final_warmup}"))
        return found

    def check_steps(self, total: int) -> None:
        if self.use_asa and self.final_warmup > total:
            told = f"{self.final_warmup} is above the run's {total} steps, which end before enough groups are frozen"
            raise AdapterError(told, key="final_warmup", hint="lower it, or train for longer")

    def file_dict(self) -> dict[str, Any]:
        written = super().file_dict()
        written.pop("init_weights", None)  # what is read from a file does not start anew
        return written
