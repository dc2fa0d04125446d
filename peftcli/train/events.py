"""What happens in a run, for whoever shows it. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Message:
    """A text for the user: what takes a while now, or what became of it."""

    text: str
    is_warning: bool = False


def warning(text: str) -> Message:
    """Something that the user should know and that does not stop the run."""
    return Message(text, is_warning=True)


@dataclass(frozen=True)
class RowsRead:
    """Rows of a dataset were encoded, or looked at before that."""

    source: str
    count: int
    """Rows so far."""
    done: bool
    what: str = "read"
    """What is done with them."""


@dataclass(frozen=True)
class Ready:
    """Training begins."""

    run: dict[str, Any]
    """The content of run.json so far."""
    start_step: int
    total_steps: int


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    step: int
    """Number of the step, from 1."""
    loss: float
    """Mean loss over the targets of the global batch, before the update, without the method's penalty."""
    grad_norm: float
    """Norm of the gradients before clipping."""
    learning_rate: float
    num_targets: int
    """Targets in the global batch."""
    num_tokens: int
    """Size of the global batch in the task's unit, its targets included, padding aside."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """What the task measures of each step, as the mean over the targets of the global batch."""


@dataclass(frozen=True)
class Stepped:
    """One optimizer step is done."""

    result: StepResult
    epoch: float
    logged: bool
    """Whether metrics.jsonl contains this step."""
    mean_loss: float
    """Mean loss since the last logged step."""


@dataclass(frozen=True)
class Evaluated:
    """An evaluation is done."""

    step: int
    metrics: dict[str, float]
    best: bool
    main: str = "eval_loss"
    """The name of the task's main metric."""


Event = Message | RowsRead | Ready | Stepped | Evaluated
OnEvent = Callable[[Event], None]
