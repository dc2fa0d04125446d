"""Batches of examples, made ahead of the loop in worker processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from peftcli.data.store import View
from peftcli.errors import DataError
from peftcli.schema import Training
from peftcli.system.workers import compute_ahead, spare_cores
from peftcli.tasks.base import Batch, Task

T = TypeVar("T")


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
    if not num_workers:
        yield from map(make, items)
        return

    def make_arrays(
        item: T,
    ) -> Batch:  # torch would send tensors through shared memory, of which containers have little
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
