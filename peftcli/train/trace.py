"""Which training rows taught an adapter what it answers: the gradients of its rows, and those of what is asked.

The rows are those of the run's recipe, encoded as training encoded them, one by one through the kept adapter.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from peftcli.adapters.generate import load_for_task, ready
from peftcli.adapters.load import AdapterSource, find_adapter
from peftcli.adapters.number_format import NumberFormat, number_format
from peftcli.adapters.proof.gradient_index import FORMAT, GradientIndex, open_index
from peftcli.adapters.proof.influence import dot_products, lengths, precondition
from peftcli.adapters.proof.row_gradients import RowGradients
from peftcli.core.files import read_tensors
from peftcli.core.inject import set_trainable
from peftcli.core.weights import load_state, named_tensors
from peftcli.data.store import Example, View
from peftcli.data.used_rows import UsedRows
from peftcli.errors import DataError, UsageError
from peftcli.guard.typed_fields import mapping_at
from peftcli.models.open import open_base
from peftcli.recipe import load_recipe
from peftcli.schema import Recipe
from peftcli.system import date
from peftcli.system.disk import sha256
from peftcli.tasks import open_task
from peftcli.tasks.base import Batch, Task, on_device
from peftcli.train.data import Data, load_data, with_task
from peftcli.train.events import Message, OnEvent
from peftcli.train.runs.folder import RunFolder, checkpoints

By = Literal["datainf", "tracin"]
_FOLDER = "trace"
"""Of a run folder: the indexes."""
_AT_ONCE = 8
"""Rows of a batch where the recipe leaves it to the memory."""
_SECONDS = 5.0
"""Between two reports of progress."""


@dataclass(frozen=True)
class TracedRun:
    """A finished run whose rows can be traced: its data, and its model."""

    source: AdapterSource
    recipe: Recipe
    data: Data
    model: nn.Module
    gradients: RowGradients
    numbers: NumberFormat
    tell: OnEvent

    @property
    def task(self) -> Task[Any]:
        """What the rows are for."""
        return self.data.task

    def computing(self) -> AbstractContextManager[Any]:
        """Inside, the model computes in the number format of the run's evaluations."""
        return self.numbers.autocast(self.model)

    def sketches(self, rows: Sequence[Sequence[Example]]) -> np.ndarray:
        """Return the sketch of the gradient of each row's loss, summed over the row's examples."""
        alone = [partial(self.loss, row) for row in rows]
        together = partial(self.loss, [example for row in rows for example in row])
        if any(len(row) != 1 for row in rows):
            return np.concatenate([self.gradients.of_rows([each], each).numpy() for each in alone])
        return self.gradients.of_rows(alone, together).numpy()

    def loss(self, examples: Sequence[Example]) -> torch.Tensor:
        """Return the sum of the examples' losses."""
        batch: Batch = self.task.collate(examples, training=False) | self.task.step_inputs(examples)
        with self.computing():
            return self.task.loss(self.model, on_device(batch, next(self.model.parameters()).device)).total


def open_run(name: str, tell: OnEvent = lambda event: None) -> TracedRun:
    """Open a finished run: its recipe, the rows that it was trained on, and its model.

    Raises:
        UsageError: the folder is not that of a finished run, or its task compares the rows of a batch.
        DataError: the rows are not those that the run was trained on.
    """
    source = find_adapter(name)
    path, content = source.folder / "recipe.yaml", mapping_at(source.record, "data").get("content")
    if not path.is_file() or not content:
        hint = "give the folder of a finished run of peftcli train"
        raise UsageError("has no recipe.yaml and run.json, which say what it was trained on", file=name, hint=hint)
    recipe = with_task(load_recipe(path), tell)
    base = open_base(recipe.base_model)
    task = (source.open_task(base) if source.recorded_settings else None) or open_task(recipe, base)
    if not task.divides:
        message = f"{(recipe.task or {})['type']} compares the rows of a batch: a row alone has no loss"
        raise UsageError(message, file=name)
    tell(Message("reading the data"))
    with date.fixed_date(source.day):
        data = load_data(recipe, task, tell=tell)
    if data.report["content"] != content:
        message = "the rows are not those that the run was trained on, or are encoded otherwise"
        raise DataError(message, file=str(path), key="dataset", hint="train again, or restore the data")
    tell(Message(f"loading {recipe.base_model.name}"))
    numbers = number_format(source)
    model = ready(load_for_task(source, base, data.task, numbers.weights))
    set_trainable(model, True)
    tensors = {name: value for name, (_, _, value) in named_tensors(model).items() if value.is_floating_point()}
    rounded = numbers.bf16 or numbers.weights != torch.float32
    gradients = RowGradients(tensors, list(model.modules()), rounded=rounded)
    return TracedRun(source, recipe, data, model, gradients, numbers, tell)


# --- the index --------------------------------------------------------------------------------------------------------


def index_of(run: TracedRun, view: View, what: str = "training rows", weights: Path | None = None) -> GradientIndex:
    """Return the index of a view's rows. It is made only if no index of the same content is kept.

    ``weights`` is the folder whose weights the model has; None: the adapter's own.
    """
    rows, sketcher = UsedRows(view), run.gradients.sketcher
    order = np.argsort(rows.sums(view.sizes), kind="stable")
    key = json.dumps(
        [
            FORMAT,
            sha256((weights or run.source.folder) / "adapter_model.safetensors"),
            run.source.record.get("base_model"),
            [part.content for part in view.parts],
            [sketcher.width, sketcher.parameters, str(run.numbers)],
        ]
    )
    folder = run.source.folder / _FOLDER
    build = partial(_sketches, run, rows, order, what)
    return open_index(folder, hashlib.sha256(key.encode()).hexdigest()[:32], sketcher.width, order, build)


def _sketches(run: TracedRun, rows: UsedRows, order: np.ndarray, what: str, start: int) -> Iterator[np.ndarray]:
    """Yield the sketches of the rows from ``start`` on, in order, a batch at a time."""
    given, frugal = run.recipe.training.per_device_train_batch_size, run.recipe.training.gradient_checkpointing
    batch_size = (
        1 if frugal in (True, "offload") else given if isinstance(given, int) else _AT_ONCE
    )  # what training had room for
    began = told = time.monotonic()
    for at in range(start, len(order), batch_size):
        some = order[at : at + batch_size]
        examples = [[rows.view[each] for each in range(rows.first[row], rows.first[row + 1])] for row in some]
        yield run.sketches(examples)
        if (now := time.monotonic()) - told > _SECONDS:
            told, done = now, at + len(some)
            left = (now - began) / (done - start) * (len(order) - done)
            run.tell(Message(f"gradients of {done:,} of {len(order):,} {what}; {left:.0f} s left"))


# --- influence --------------------------------------------------------------------------------------------------------


def influence(run: TracedRun, asked: Callable[[], np.ndarray], by: By, *, normalised: bool = True) -> np.ndarray:
    """Return the influence of each training row on the sum of what ``asked`` computes the sketches of.

    ``normalised`` divides by the length of a row's gradient, so that rows that are badly learnt do not lead every list.
    """
    sketcher = run.gradients.sketcher
    if by == "datainf":
        index = index_of(run, run.data.train)
        wanted = precondition(index, asked().sum(0), sketcher.blocks, sketcher.parameters)
        return _scaled(index, dot_products(index, wanted), normalised)
    total = np.zeros(0)
    for folder, rate in _checkpoints(run):
        if folder is not None:
            load_state(run.model, read_tensors(folder), str(folder))
        try:
            index = index_of(run, run.data.train, weights=folder)
            scores = rate * _scaled(index, dot_products(index, asked().sum(0)), normalised)
        finally:
            if folder is not None:
                load_state(run.model, read_tensors(run.source.folder), str(run.source.folder))
        total = scores if not len(total) else total + scores
    return total


def _scaled(index: GradientIndex, scores: np.ndarray, normalised: bool) -> np.ndarray:
    return scores / np.maximum(lengths(index), 1e-30) if normalised else scores


def _checkpoints(run: TracedRun) -> list[tuple[Path | None, float]]:
    """Return the kept checkpoints of the run with their learning rates; without any, the kept adapter with 1."""
    lines = RunFolder(run.source.folder).metrics()
    rates = {line["step"]: line["learning_rate"] for line in lines if line.get("learning_rate")}
    found = list[tuple[Path | None, float]]()
    for folder in checkpoints(run.source.folder / "checkpoints"):
        step = int(folder.name.removeprefix("step-"))
        if before := [known for known in rates if known <= step]:
            found.append((folder, rates[max(before)]))
    return found or [(None, 1.0)]
