"""Metrics of a model on evaluation data."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import count
from statistics import fmean
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from peftcli.data.store import View
from peftcli.errors import PeftcliError, UsageError
from peftcli.recipe import FORGETTING, LEARNT, MAX_REGRESSION, forgets_rows, forgetting_problem, parse_regression
from peftcli.schema import Recipe, Training
from peftcli.tasks import task_record
from peftcli.tasks.base import Loss, Task, on_device
from peftcli.train.batches import batches, collate
from peftcli.train.data import Data
from peftcli.train.devices.launch import MEASURING, report
from peftcli.train.devices.sharding import is_sharded
from peftcli.train.kept_rows import EarlierRun
from peftcli.train.plan import chunks

_LOOK_SECONDS = 0.02
_evaluations = count()
"""Numbers the evaluations of this process, equally in all processes."""


def _batches(
    examples: View, groups: np.ndarray | None, batch_size: int, accelerator: Accelerator, sharded: bool
) -> list[tuple[list[int], bool]]:
    """Return what this process computes in each round of all processes: rows of like sizes, and whether they count.

    A process without a batch counts one example zero times: where it has none at all, and where the model is divided,
    so that the others need its part of the weights.
    """
    order = np.argsort(examples.sizes, kind="stable")
    groups = np.zeros_like(order) if groups is None else groups
    parts = [part.tolist() for part in chunks(order, groups, batch_size)]
    mine = parts[accelerator.process_index :: accelerator.num_processes]
    rounds = -(-len(parts) // accelerator.num_processes)
    idle = order[:1].tolist() if sharded or not mine else []
    return [*((batch, True) for batch in mine), *[(idle, False)] * (rounds - len(mine))]


def refuse_metrics(recipe: Recipe, data: Data) -> None:
    """Check that evaluation reports what the recipe compares, and that it is known which values are better.

    Raises:
        UsageError: it does not, or it is not.
    """
    _refuse_forgetting(recipe, data)
    if data.eval is None or recipe.training.eval_strategy == "no":
        return
    refuse_gates(recipe, data)
    best, training = best_metric(recipe.training), recipe.training
    if _known(data, best, "training.metric_for_best_model") == ["eval_*"] and training.greater_is_better is None:
        message = f"whether a larger {best} is better is for you to say: true or false"
        raise UsageError(message, key="training.greater_is_better")


def import_packages(data: Data, training: Training) -> None:
    """Import what evaluations in a run will need. Between the memory of steps it would leave gaps that nothing fits."""
    if data.eval is not None and training.eval_strategy != "no":
        for package in data.task.packages:
            importlib.import_module(package)


def best_metric(training: Training) -> str:
    """The metric that decides which evaluation is best, with the prefix ``eval_``, which the recipe may leave out."""
    return f"eval_{training.metric_for_best_model.removeprefix('eval_')}"


def refuse_gates(recipe: Recipe, data: Data) -> None:
    """Check that evaluation reports what gates are of.

    Raises:
        UsageError: it does not.
    """
    _refuse_forgetting(recipe, data)
    for name in recipe.gates.keys() - {LEARNT, FORGETTING, MAX_REGRESSION}:
        _known(data, name, f"gates.{name}")
    if given := recipe.gates.get(MAX_REGRESSION):
        against, bounds = parse_regression(given)
        for name in bounds:
            _known(data, name, f"gates.{MAX_REGRESSION}.{name}")
        assert data.eval is not None
        EarlierRun.read(against).refuse_others(data.task, task_record(data.task, recipe), data.eval, list(bounds))


def _refuse_forgetting(recipe: Recipe, data: Data) -> None:
    """Refuse the gate ``forgetting`` where nothing can measure it."""
    if recipe.gates.get(FORGETTING, False) is False:
        return
    problem = forgetting_problem(recipe)
    if forgets_rows(recipe) and not problem:
        if data.eval is None:
            problem = "compares evaluation rows, which the recipe does not have"
        elif not data.task.judges_rows:
            problem = "compares rows that are right or wrong, and an answer of this task is neither"
    if problem:
        raise UsageError(problem, key=f"gates.{FORGETTING}")


def _known(data: Data, name: str, key: str) -> list[str]:
    """The names and patterns of reported metrics that a name is one of."""
    names = [f"eval_{each}" for each in data.task.reports]
    known = [each for each in names if name == each or fnmatchcase(name, each)]
    if not known:
        raise UsageError(f"evaluation reports {', '.join(names)}, not {name}", key=key)
    return known


@torch.no_grad()
def losses_of_batches(
    model: nn.Module,
    task: Task[Any],
    examples: View,
    batch_size: int,
    accelerator: Accelerator,
    num_workers: int,
    stopping: Callable[[], bool],
) -> Iterator[tuple[list[int], bool, Loss | None]]:
    """Yield each batch of this process: its examples, whether they count, and its loss; None where it gave up."""
    was_training = model.training
    model.eval()
    inner = accelerator.unwrap_model(model)  # no gradients to synchronise, and the processes' batch counts may differ
    rounds = _batches(examples, task.groups(examples), batch_size, accelerator, is_sharded(inner))
    make, computed = partial(collate, task, examples, training=False), [indices for indices, _ in rounds if indices]
    try:
        with closing(batches(make, computed, num_workers)) as ahead:
            for indices, counts in rounds:
                if stopping():
                    yield [], False, None
                    return
                if not indices:
                    continue
                batch = on_device(next(ahead), accelerator.device)
                with accelerator.autocast():
                    loss = task.loss(inner, batch)
                yield indices, counts, loss
    finally:
        model.train(was_training)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task[Any],
    examples: View,
    batch_size: int,
    accelerator: Accelerator,
    *,
    num_workers: int = 0,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Compute the task's metrics over all examples, each name with the prefix ``eval_``.

    The result does not depend on the batch size or the number of processes, float error aside. All processes evaluate
    together, ``batch_size`` examples at once in each, and get the metrics that process 0 computes. ``stopping`` says
    whether to give up; it is called before each batch, by all processes equally often.

    Returns:
        The metrics; None if it gave up.
    """
    sums: dict[str, torch.Tensor] = {}
    outputs: list[tuple[int, Any]] = []
    for indices, counts, loss in losses_of_batches(
        model, task, examples, batch_size, accelerator, num_workers, stopping
    ):
        if loss is None:
            return None
        for name, value in loss.sums.items():
            counted = value.detach().to("cpu", torch.float64) * counts
            sums[name] = sums[name] + counted if name in sums else counted
        if loss.outputs and counts:
            outputs += zip(indices, loss.outputs, strict=True)
    here = {name: sums[name].to(accelerator.device).contiguous() for name in sorted(sums)}
    reduced = {name: total.cpu().numpy() for name, total in accelerator.reduce(here, reduction="sum").items()}
    gathered = sorted(gather_object(outputs), key=lambda each: each[0])
    ordered = [output for _, output in gathered]
    return _measure_in_first(lambda: task.metrics(reduced, ordered, int(examples.targets.sum())), accelerator)


def _measure_in_first(compute: Callable[[], Mapping[str, float]], accelerator: Accelerator) -> dict[str, float]:
    """Compute metrics in process 0, however long it takes, and return them in all processes."""
    found: Any = None
    key, distributed = f"peftcli evaluation {next(_evaluations)}", torch.distributed
    # its keys can be waited for longer than a collective lets a process wait
    store: Any = distributed.distributed_c10d._get_default_store() if distributed.is_initialized() else None
    if accelerator.process_index == 0:  # a user's own metric may draw random numbers, and cost money
        report(MEASURING)
        try:
            found = {f"eval_{name}": float(value) for name, value in compute().items()}
        except PeftcliError as error:
            found = error
        finally:
            report(MEASURING, over=True)
        if store is not None:
            store.set(key, "measured")
    while store is not None and not store.check([key]):
        time.sleep(_LOOK_SECONDS)
    (found,) = broadcast_object_list([found])
    if isinstance(found, PeftcliError):
        raise found
    return found


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
    losses = _losses(before, after, lines if task.loss_falls else ())
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
    gain = other - value if is_lower_better(task, name) else value - other
    return gain > margin * abs(other)


def is_lower_better(task: Task[Any], name: str) -> bool:
    """Return whether a smaller value of a metric is better."""
    return any(fnmatchcase(name.removeprefix("eval_"), known) for known in task.lower_is_better)
