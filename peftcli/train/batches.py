"""Which rows of a step go through the model at once, how they become a batch, and batches made ahead in processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.data.store import View
from peftcli.errors import DataError
from peftcli.schema import Training
from peftcli.system.workers import compute_ahead, spare_cores
from peftcli.tasks.base import Batch, Packs, Task
from peftcli.tasks.text.fast.parts import PART, parts_of, parts_of_like_length
from peftcli.tasks.text.fast.unpadded import is_unpadded
from peftcli.train.plan import MicroBatch, Plan

T = TypeVar("T")
_STEPS = 50
"""Of how many steps the padding is counted."""


@dataclass(frozen=True)
class BatchForm:
    """How a model on its device takes the micro-batches of a task."""

    joins: bool
    """Whether the examples of a packed row are joined before the model, which would else compute their padding."""
    pads: bool
    """Whether the model computes the padding of a batch."""
    divides: bool
    """Whether micro-batches are computed in parts, which give the same sum of gradients with less memory or padding."""

    @classmethod
    def of(
        cls, model: nn.Module, task: Task[Any], config: AdapterConfig, plan: Plan, *, in_step: bool = False
    ) -> BatchForm:
        """Return the form for a model with an adapter; ``in_step``: all processes run it equally often."""
        unpadded, on_cpu = is_unpadded(model), next(model.parameters()).device.type == "cpu"
        sums = task.divides and not config.reads_batches()
        divides = task.unit == "tokens" and sums and on_cpu and not in_step
        return cls(joins=plan.packs and not unpadded, pads=not unpadded, divides=divides)

    def divided(self, micro_batches: list[MicroBatch], examples: View) -> list[MicroBatch]:
        """Return what is in the model at once, one after another: parts by their length, the longest first.

        What those leave free in memory holds the shorter ones; the other way round each would take new memory.
        """
        if not self.divides:
            return micro_batches
        parts = [rows[part] for rows in micro_batches for part in self._parts(rows, examples)]
        return parts[::-1]  # rows of a step stand in the order of their length

    def _parts(self, rows: MicroBatch, examples: View) -> list[slice]:
        if self.pads:
            return parts_of_like_length([int(examples.sizes[row].sum()) for row in rows]) or [slice(0)]
        return parts_of([[examples[at] for at in row] for row in rows], PART)

    def efficiency(self, plan: Plan, examples: View) -> float:
        """Return which share of the tokens that the model computes, in an epoch's first steps, is no padding.

        It goes by the sizes of examples, as if each were one text.
        """
        if not (self.pads and self.divides):
            return plan.efficiency if self.pads else 1.0
        whole = computed = 0
        for step in range(min(plan.steps_per_epoch, _STEPS)):
            for process in range(plan.num_processes):
                for rows in filter(None, self.divided(plan.micro_batches(step, process), examples)):
                    sizes = [int(examples.sizes[row].sum()) for row in rows]
                    whole, computed = whole + sum(sizes), computed + len(sizes) * max(sizes)
        return whole / computed

    def batch(self, task: Task[Any], examples: View, plan: Plan, step: int, rows: MicroBatch) -> Batch:
        """Return rows of a step, counted from 0, as the model takes them.

        Raises:
            DataError: the file of one cannot be read any more.
        """
        if self.joins:
            assert isinstance(task, Packs)
            return task.collate([task.join([examples[at] for at in row]) for row in rows], training=True)
        batch = collate(task, examples, list(chain(*rows)), training=True, draw=partial(plan.draw, step))
        return batch | task.step_inputs(examples[at] for at in plan.global_batch(step))


def num_workers(training: Training, task: Task[Any]) -> int:
    """Return how many worker processes make the batches of this process."""
    if training.dataloader_num_workers != "auto":
        return training.dataloader_num_workers
    return spare_cores(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) if task.reads_files else 0


def batches(make: Callable[[T], Batch], items: Iterable[T], num_workers: int) -> Generator[Batch]:
    """Yield the batch that ``make`` makes of each item, in order: the same with any number of workers.

    Raises:
        DataError: a file cannot be read any more.
        ProcessDied: a worker was killed.
    """

    # torch would send tensors through shared memory, of which containers have little
    def make_arrays(item: T) -> Batch:
        return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in make(item).items()}

    for batch in compute_ahead(make_arrays, items, num_workers):
        yield {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()
        }


def collate(
    task: Task[Any],
    examples: View,
    indices: Sequence[int],
    *,
    training: bool,
    draw: Callable[[int], int] = lambda index: 0,
) -> Batch:
    """Put examples into one batch.

    ``draw`` returns ``Example.draw`` of an index.

    Raises:
        DataError: the file of one cannot be read any more; names its row.
    """
    try:
        return task.collate([replace(examples[at], draw=draw(at)) for at in indices], training=training)
    except DataError:
        for at in indices:
            try:
                task.collate([examples[at]], training=training)
            except DataError as error:
                message = f"{error.file}: {error.message}" if error.file else error.message
                raise examples.place(at).error(message, hint=error.hint) from None
        raise
