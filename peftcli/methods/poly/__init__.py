"""Poly and MHR: Combining Modular Skills in Multitask Learning (https://arxiv.org/abs/2202.13914)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peftcli.core.config import ExcludingConfig
from peftcli.guard.ranges import AT_LEAST_1

_BY_TASK: dict[str, Any] = AT_LEAST_1 | {"python_only": "its rows do not say which task they belong to"}


@dataclass(kw_only=True)
class PolyConfig(ExcludingConfig):
    """Settings of Poly, under PEFT's names."""

    peft_type = "POLY"
    learning_rate = 2e-3
    sizes: ClassVar[tuple[str, ...]] = ("r", "n_tasks", "n_skills", "n_splits")
    always_written: ClassVar[tuple[str, ...]] = ("r", "target_modules", "n_tasks", "n_skills", "n_splits")

    r: int = field(default=8, metadata=AT_LEAST_1)
    """Size of each skill's bottleneck. Parameters and memory grow with it, n_skills times."""
    n_skills: int = field(default=4, metadata=AT_LEAST_1)
    """Low-rank updates of each layer, which every task mixes in shares of its own."""
    n_splits: int = field(default=1, metadata=AT_LEAST_1)
    """Into how many parts a layer's inputs and outputs are divided. Each part has a mixture of its own (MHR)."""
    n_tasks: int = field(default=1, metadata=_BY_TASK)
    """How many tasks share the skills. Of more than one, each input says its own: task_ids."""
    poly_type: Literal["poly"] = "poly"
    """How a task chooses its shares. There is only one way."""
    init_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""

    def merge_problem(self) -> str | None:
        one_task = self.n_tasks == 1
        return None if one_task else "Poly's update depends on the row's task, so it cannot be merged into a weight"
