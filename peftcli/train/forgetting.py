"""What a finished run has forgotten: whether it is measured, of which adapter, and for how long."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from peftcli.adapters.proof.forgetting import measure_forgetting
from peftcli.errors import PeftcliError, to_peftcli_error
from peftcli.guard.files import one_line
from peftcli.recipe import FORGETTING
from peftcli.schema import Recipe
from peftcli.tasks import row_of
from peftcli.tasks.base import Task
from peftcli.train.compare import Comparison
from peftcli.train.data import RunData
from peftcli.train.devices.sharding import is_sharded
from peftcli.train.events import Message
from peftcli.train.runs.record import ForgettingRecord
from peftcli.train.runs.resume import Run
from peftcli.train.runs.typed_json import ABSENT, from_json

_SHARE, _LEAST_SECONDS = 0.1, 0.5
"""The share of a run's time that ``auto`` spends, and the fewest seconds for which it begins."""


def forgetting_of(run: Run, data: RunData, model: nn.Module, *, is_kept: bool) -> Any:
    """Measure what the adapter that the run keeps has forgotten, if the recipe wants it.

    ``is_kept``: the model holds that adapter.

    Returns its record, which says why where it could not be measured; ABSENT where it does not apply.
    """
    recipe, forced = run.recipe, is_forced(run.recipe)
    if not row_of(recipe).writes_text or not (forced or recipe.training.measure_forgetting == "auto"):
        return ABSENT
    divided, seconds = is_sharded(model), None if forced else _SHARE * run.record.wall_seconds
    if not run.is_main and not divided:
        return ABSENT
    if not is_kept:
        return ForgettingRecord(skipped="the best adapter is in its file only, not in the model")
    if seconds is not None and divided:
        return ForgettingRecord(skipped="the model is divided among processes, and training.measure_forgetting is auto")
    if seconds is not None and seconds < _LEAST_SECONDS:
        return ForgettingRecord(
            skipped=f"the run took {run.record.wall_seconds:.1f} s, too short to spend a tenth on it"
        )
    run.tell(Message("measuring what was forgotten"))
    more = {"seconds": seconds, "stopping": lambda: bool(run.stop.request)}
    compiled = torch.compiler.set_stance("force_eager") if recipe.training.torch_compile else nullcontext()
    with compiled:
        return measured_forgetting(model, data.task, run.accelerator, divided=divided, **more)


def is_forced(recipe: Recipe) -> bool:
    """Whether the recipe wants the measure whatever it costs: it says so, or has a gate of it."""
    return recipe.training.measure_forgetting is True or recipe.gates.get(FORGETTING, False) is not False


def measured_forgetting(
    model: nn.Module, task: Task[Any], accelerator: Accelerator, **options: Any
) -> ForgettingRecord:
    """Measure a model. An error becomes the reason why it was skipped: the adapter is worth more than its measure."""
    try:
        with accelerator.autocast():
            return from_json(ForgettingRecord, measure_forgetting(model, task, **options))
    except Exception as error:
        ours = to_peftcli_error(error) or PeftcliError(f"{type(error).__name__}: {error}")
        return ForgettingRecord(skipped=one_line(ours.message)[:200])


def forgotten(record: Any, comparison: Comparison | None) -> float | str | None:
    """What a gate compares, or why it is not known; None where nothing was to be measured.

    Of a task that writes text the rise of the loss, of another the share of rows that the base model had right and the
    adapter has wrong.
    """
    if record:
        value: float | str = record.skipped or record.loss
        return value
    if comparison is None:
        return None
    compared = comparison.record
    if compared.base_head_is_new:
        return "the base model has no trained head, so it guesses and has nothing to forget"
    if not compared.right:
        return compared.skipped or "an answer of this task is neither right nor wrong"
    if not compared.right.base:
        return "the base model has no row right, so it has nothing to forget"
    return compared.right.lost / compared.right.base
