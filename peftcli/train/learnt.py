"""Whether a run has learnt anything: its evaluations, or else its training losses, against what needs no learning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from statistics import fmean
from typing import Any

from peftcli.data.store import View
from peftcli.tasks.base import Task

_FEW_STEPS = 20
"""A shorter run is judged by the rise of its loss alone: it may not have come away from where it started."""
_RISE, _RISE_OF_TRAINING = 1.05, 2.0
"""Losses rise by more than this factor. Those of training are of other rows each time."""
_EQUAL = 0.005
"""A share of a constant answer's metric by which a better one must differ from it."""


@dataclass(frozen=True)
class Losses:
    """The loss at the start and at the end of training, and how they are called."""

    name: str
    first: float
    last: float
    factor: float
    """How much larger the last one must be to be a rise."""

    @property
    def rise(self) -> str:
        """What to say of a rise; empty without a rise."""
        rises = self.last > self.first + (self.factor - 1) * abs(self.first)
        return f"{self.name} rose from {self.first:.4f} to {self.last:.4f}" if rises else ""


def no_learning(doubts: Sequence[str]) -> str:
    """Return the sentence that tells doubts."""
    return f"no sign of learning: {'; '.join(doubts)}"


def main_metric(task: Task[Any], metrics: Mapping[str, float]) -> str:
    """Return the name of the task's main metric among those that were measured; that of the loss where it was not."""
    name = f"eval_{task.main_metric}"
    return name if name in metrics else "eval_loss"


def find_doubts(
    task: Task[Any],
    view: View,
    before: Mapping[str, float],
    after: Mapping[str, float],
    lines: Sequence[dict[str, Any]] = (),
    steps: float = math.inf,
) -> list[str]:
    """Return why nothing seems to have been learnt; empty where something was, or where too little is known.

    ``before`` and ``after`` are metrics of the evaluation data, as far as they were measured, ``lines`` those of
    metrics.jsonl, and ``view`` the evaluation data, or the training data without one.
    """
    losses = _losses(before, after, lines)
    if not after and losses is not None:
        after = {"eval_loss": losses.last}
    constant = {f"eval_{name}": value for name, value in task.constant_metrics(view).items()}
    metric = main_metric(task, after)
    known = [(each[metric], margin) for each, margin in ((before, 0.0), (constant, _EQUAL)) if metric in each]
    if metric != "eval_loss" and known and all(_is_better(task, metric, after[metric], *each) for each in known):
        return []  # whatever the loss is: a sure model pays more for its mistakes
    rise = losses.rise if losses is not None else ""
    if not rise and steps < _FEW_STEPS:
        return []
    found = list[str]()
    for name in dict.fromkeys((metric, "eval_loss")):
        says = f"{name} is {after[name]:.4f}" if name in after else ""
        if name == "eval_loss" and losses is not None:
            says = rise or f"{losses.name} is {losses.last:.4f}"
        if name in after and name in constant and not _is_better(task, name, after[name], constant[name], _EQUAL):
            found.append(f"{says}, no better than a constant answer's {constant[name]:.4f}")
        elif name == "eval_loss" and rise:
            found.append(rise)
    return found


def _losses(before: Mapping[str, float], after: Mapping[str, float], lines: Sequence[Any]) -> Losses | None:
    """Return the losses to compare: those of the evaluation data if both were measured, else those of training."""
    if "eval_loss" in before and "eval_loss" in after:
        return Losses("eval_loss", before["eval_loss"], after["eval_loss"], _RISE)
    logged = [line["loss"] for line in lines if "loss" in line]
    if len(logged) < 2:
        return None
    some = math.ceil(len(logged) / 4)
    return Losses("the training loss", fmean(logged[:some]), fmean(logged[-some:]), _RISE_OF_TRAINING)


def _is_better(task: Task[Any], name: str, value: float, other: float, margin: float = 0.0) -> bool:
    """Return whether a metric is better than another value of it, by more than a share of that."""
    lower = any(fnmatchcase(name.removeprefix("eval_"), known) for known in task.lower_is_better)
    return (other - value if lower else value - other) > margin * abs(other)
