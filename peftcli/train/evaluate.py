"""Metrics of a model on evaluation data."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from fnmatch import fnmatchcase
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from peftcli.data.store import View
from peftcli.errors import PeftcliError, UsageError
from peftcli.recipe import LEARNT
from peftcli.schema import Recipe, Training
from peftcli.tasks.base import Task, on_device
from peftcli.train.batches import batches, collate
from peftcli.train.data import Data
from peftcli.train.devices.launch import MEASURING, report
from peftcli.train.devices.sharding import is_sharded

_LOOK_SECONDS = 0.02
_evaluations = count()
"""Numbers the evaluations of this process, equally in all processes."""


def _batches(examples: View, batch_size: int, accelerator: Accelerator, sharded: bool) -> list[tuple[list[int], bool]]:
    """Return what this process computes in each round of all processes: rows of like sizes, and whether they count.

    A process without a batch counts one example zero times: where it has none at all, and where the model is divided,
    so that the others need its part of the weights.
    """
    order = np.argsort(examples.sizes, kind="stable").tolist()
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = parts[accelerator.process_index :: accelerator.num_processes]
    rounds = -(-len(parts) // accelerator.num_processes)
    idle = order[:1] if sharded or not mine else []
    return [*((batch, True) for batch in mine), *[(idle, False)] * (rounds - len(mine))]


def refuse_metrics(recipe: Recipe, data: Data) -> None:
    """Check that evaluation reports what the recipe compares, and that it is known which values are better.

    Raises:
        UsageError: it does not, or it is not.
    """
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
    for name in recipe.gates.keys() - {LEARNT}:
        _known(data, name, f"gates.{name}")


def _known(data: Data, name: str, key: str) -> list[str]:
    """The names and patterns of reported metrics that a name is one of."""
    names = [f"eval_{each}" for each in data.task.reports]
    known = [each for each in names if name == each or fnmatchcase(name, each)]
    if not known:
        raise UsageError(f"evaluation reports {', '.join(names)}, not {name}", key=key)
    return known


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
    was_training = model.training
    model.eval()
    sums: dict[str, torch.Tensor] = {}
    outputs: list[tuple[int, Any]] = []
    inner = accelerator.unwrap_model(model)  # no gradients to synchronise, and the processes' batch counts may differ
    rounds = _batches(examples, batch_size, accelerator, is_sharded(inner))
    make, computed = partial(collate, task, examples, training=False), [indices for indices, _ in rounds if indices]
    with closing(batches(make, computed, num_workers)) as ahead:
        for indices, counts in rounds:
            if stopping():
                model.train(was_training)
                return None
            if not indices:
                continue
            batch = on_device(next(ahead), accelerator.device)
            with accelerator.autocast():
                loss = task.loss(inner, batch)
            for name, value in loss.sums.items():
                counted = value.detach().to("cpu", torch.float64) * counts
                sums[name] = sums[name] + counted if name in sums else counted
            if loss.outputs and counts:
                outputs += zip(indices, loss.outputs, strict=True)
    model.train(was_training)
    here = {name: sums[name].to(accelerator.device).contiguous() for name in sorted(sums)}
    reduced = {name: total.cpu().numpy() for name, total in accelerator.reduce(here, reduction="sum").items()}
    gathered = sorted(gather_object(outputs), key=lambda each: each[0])
    ordered = [output for _, output in gathered]
    return _measure_in_first(lambda: task.metrics(reduced, ordered, int(examples.targets.sum())), accelerator)


def _measure_in_first(compute: Callable[[], Mapping[str, float]], accelerator: Accelerator) -> dict[str, float]:
    """Compute metrics in process 0, however long it takes, and return them in all processes.

    Raises:
        PeftcliError: process 0 raised it.
    """
    found: Any = None
    store, key = _shared_store(), f"peftcli evaluation {next(_evaluations)}"
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


def _shared_store() -> Any:
    """Torch's store of keys, by which processes wait longer than a collective lets them; None where one is alone."""
    return torch.distributed.distributed_c10d._get_default_store() if torch.distributed.is_initialized() else None
