"""AdaMSS: Adaptive Multi-Subspace Approach for Fine-Tuning (https://neurips.cc/virtual/2025/poster/119606)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from peftcli.core.config import LayeredConfig
from peftcli.errors import AdapterError
from peftcli.methods._settings import Problems, not_positive, outside_unit_interval, too_small


@dataclass(kw_only=True)
class AdamssConfig(LayeredConfig):
    """Settings of AdaMSS, under PEFT's names."""

    peft_type = "ADAMSS"
    learning_rate = 5e-3
    sizes: ClassVar[tuple[str, ...]] = ()  # a layer's own sizes are the limit of each
    always_written: ClassVar[tuple[str, ...]] = ("r", "num_subspaces", "subspace_rank", "target_modules", "random_seed")

    r: int = 100
    """How many of a weight's singular directions the update reads its input through."""
    num_subspaces: int = 5
    """Into how many groups a layer's outputs are divided. Each has an update of its own."""
    subspace_rank: int = 1
    """Size of each group's bottleneck. A layer has subspace_rank * (num_subspaces * r + outputs) trained numbers."""
    init_weights: Literal["orthogonal", False] | None = "orthogonal"
    """orthogonal: start from no update at all; false: at random, for tests."""
    use_asa: bool = False
    """Freeze the least important groups while training, until asa_target_subspaces are left."""
    asa_target_subspaces: int = 50
    """How many groups of the whole model still train at the end. Where it has no more of them, none is frozen."""
    init_warmup: int = 50
    """Step from which groups may be frozen."""
    final_warmup: int = 1000
    """Step from which on no more than asa_target_subspaces train."""
    mask_interval: int = 100
    """Number of steps between two times that groups are frozen; the last time is at final_warmup."""
    asa_importance_beta: float = 0.85
    """How slowly the importance of a weight follows its last steps; nearer to 1 is slower."""
    asa_uncertainty_beta: float = 0.85
    """The same for how much that importance varies."""
    asa_schedule_exponent: float = 3.0
    """How early groups are frozen: 1 is evenly, more is earlier."""
    use_dynamic_rank: bool = False
    """Give a group a bottleneck below subspace_rank where its directions are few."""
    svd_threshold: float = 0.1
    """With use_dynamic_rank: a direction counts from this share of the group's strongest one on."""
    random_seed: int = 0
    """Seed of the decomposition, which starts from a random matrix."""

    def normalise(self) -> None:
        super().normalise()
        if self.init_weights is False:
            self.init_weights = None

    def problems(self) -> Problems:
        found = super().problems() + too_small(self, r=1, num_subspaces=1, subspace_rank=1)
        found += outside_unit_interval(self, "svd_threshold")
        if not self.use_asa:
            return found
        found += too_small(self, asa_target_subspaces=1, mask_interval=1, init_warmup=0)
        found += outside_unit_interval(self, "asa_importance_beta", "asa_uncertainty_beta")
        found += not_positive(self, "asa_schedule_exponent")
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
