"""Settings that are chosen by the memory there is: examples at once, checkpointing, and what each process holds.

None of them changes the batch of a step, or what is learned, rounding aside. A run that goes on keeps what was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from peftcli.core.heads import head_names
from peftcli.core.inject import inject
from peftcli.errors import UsageError
from peftcli.models.base import OpenBase
from peftcli.models.open import open_base
from peftcli.recipe import method_config
from peftcli.schema import BaseModel, Launch, Recipe
from peftcli.system.memory import free_memory, resident_memory
from peftcli.tasks import open_task, row_of
from peftcli.tasks.base import FitsModel, Gathers, Task
from peftcli.train.data import Data, load_data, plan_of
from peftcli.train.estimate import Estimate, estimate
from peftcli.train.launch import process_count, total_processes
from peftcli.train.report import OnEvent, Phase
from peftcli.train.runs.record import RunRecord

_USED = 0.9
"""The share of the memory that an estimate may fill."""
_CHOSEN = {
    "training": ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
    "launch": ("strategy",),
}


def is_fitted(recipe: Recipe) -> bool:
    """Whether nothing is left to choose."""
    training = recipe.training
    return "auto" not in (training.per_device_train_batch_size, training.gradient_checkpointing, recipe.launch.strategy)


def smallest(recipe: Recipe) -> Recipe:
    """Return the recipe with an example at once, if that is not chosen yet: for what does not depend on the choice."""
    training, launch = recipe.training, recipe.launch
    found = {
        "per_device_train_batch_size": 1 if training.per_device_train_batch_size == "auto" else training.rows_at_once,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "gradient_checkpointing": training.gradient_checkpointing is True,
    }
    return _with(recipe, {"training": found, "launch": {"strategy": launch.strategy.replace("auto", "replicate")}})


def fitted(recipe: Recipe, accelerator: Accelerator, before: RunRecord | None, tell: OnEvent) -> Recipe:
    """Return the recipe with all settings chosen: as in the run that goes on, or as process 0 finds.

    Raises:
        UsageError: it is not known what the model needs, or there is nothing to choose from.
    """
    if is_fitted(recipe):
        return recipe
    if before is not None and (before.resumable or before.status == "complete"):
        return _with(recipe, {section: before.recipe[section] for section in _CHOSEN})
    found: list[Any] = [None]
    if accelerator.is_main_process:
        tell(Phase("finding what fits into the memory"))
        base = open_base(recipe.base_model)
        fits, needs = fit(recipe, base, load_data(recipe, open_task(recipe, base)))
        tell(Phase(_account(fits, needs)))
        found[0] = asdict(fits)
    broadcast_object_list(found)
    return _with(recipe, found[0])


def fit(recipe: Recipe, base: OpenBase, data: Data) -> tuple[Recipe, Estimate]:
    """Return the recipe with all settings chosen, and what it needs then: the fastest that fits, else the smallest.

    Raises:
        UsageError: it is not known what the model needs, or there is nothing to choose from.
    """
    training, launch = recipe.training, recipe.launch
    size, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if size == "auto" and steps == 1:
        hint = "training.gradient_accumulation_steps: how many examples a step has on a device"
        raise UsageError("auto has one example to divide", key="training.per_device_train_batch_size", hint=hint)
    strategies = ["replicate", "fsdp"] if launch.strategy == "auto" else [launch.strategy]
    if total_processes(launch) == 1 or not may_shard(data.task):
        strategies = strategies[:1]
    checkpointing = training.gradient_checkpointing
    ways = list(product(strategies, [False, True] if checkpointing == "auto" else [checkpointing]))
    sizes = [each for each in range(1, steps + 1) if steps % each == 0] if size == "auto" else [size]
    total = steps if size == "auto" else size * steps
    limit = _memory(launch)

    def tried(way: tuple[str, bool], size: int) -> tuple[Recipe, Estimate]:
        changed = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": total // size,
            "gradient_checkpointing": way[1],
        }
        fits = _with(recipe, {"training": changed, "launch": {"strategy": way[0]}})
        return fits, _estimate(fits, base, data)

    for way in ways:
        found = tried(way, sizes[0])
        if found[1].peak > limit:
            continue
        low, high = 0, len(sizes)  # the first fits; whether the last does is not known
        while high - low > 1:
            middle = (low + high) // 2
            larger = tried(way, sizes[middle])
            if larger[1].peak <= limit:
                low, found = middle, larger
            else:
                high = middle
        return found
    return tried(ways[-1], sizes[0])


def may_shard(task: Task[Any]) -> bool:
    """Whether fsdp divides the models of a task: those of texts, if it does not compare the rows of a batch."""
    return task.unit == "tokens" and not isinstance(task, Gathers)


def chosen(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that were chosen."""
    return {key: getattr(getattr(recipe, section), key) for section, keys in _CHOSEN.items() for key in keys}


def _memory(launch: Launch) -> float:
    """Bytes that a process may fill."""
    if torch.cuda.is_available():
        return _USED * torch.cuda.mem_get_info()[0]
    return _USED * (free_memory() / process_count(launch) + resident_memory())


def _estimate(recipe: Recipe, base: OpenBase, data: Data) -> Estimate:
    """What a recipe needs, whose data is loaded."""
    config, task = method_config(recipe), data.task
    config.prepare(lambda name: (open_base(BaseModel(name=name)) if name else base).processor())
    options = task.model_options()
    model = base.empty_model(row_of(recipe).auto_class, **options)
    if isinstance(task, FitsModel):
        task.fit_model(model, config)
    config.task_type = row_of(recipe).task_type
    heads = tuple(head_names(model) if options else ())
    new = [name for name, _ in model.named_parameters() if name.startswith(tuple(f"{head}." for head in heads))]
    inject(model, config, initialised=new)
    try:
        return estimate(model, config, recipe, data, plan_of(recipe, data, total_processes(recipe.launch)), base.folder)
    except RuntimeError:
        hint = "give numbers, true or false, or a strategy instead of auto"
        raise UsageError("what this model needs of memory is not known before", key="training", hint=hint) from None


def _account(recipe: Recipe, needs: Estimate) -> str:
    """What was chosen, and why."""
    training, strategy = recipe.training, recipe.launch.strategy
    again = ", activations computed again" if training.gradient_checkpointing else ""
    divided = ", the base model divided" if strategy == "fsdp" else ""
    examples = f"{training.rows_at_once} of {training.rows_at_once * training.gradient_accumulation_steps} examples"
    there = _memory(recipe.launch) / 2**30
    return f"memory: {examples} at once{again}{divided}: about {needs.peak / 2**30:.1f} of {there:.1f} GiB"


def _with(recipe: Recipe, values: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """The recipe with some settings as in ``values``."""
    parts = {
        section: replace(getattr(recipe, section), **{key: values[section][key] for key in keys})
        for section, keys in _CHOSEN.items()
    }
    return replace(recipe, **parts)
