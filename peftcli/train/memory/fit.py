"""What fits, found before the model is loaded: into the disk, and into memory by the settings that are left to it.

The latter are examples at once, checkpointing, and what each process holds.

None of them changes the batch of a step, or what is learned, rounding aside. A run that goes on keeps what was chosen.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from peftcli.core.config import AdapterConfig
from peftcli.core.inject import inject
from peftcli.errors import AdapterError, ModelError, OutOfMemory, UsageError
from peftcli.guard.typed_fields import mapping_at
from peftcli.models.base import OpenBase
from peftcli.models.open import open_base
from peftcli.models.parts import parameters_of_heads, stacks
from peftcli.recipe import method_config, to_dict
from peftcli.schema import DIVIDED, Recipe
from peftcli.system.memory import free_memory, peak_resident_memory, resident_memory
from peftcli.tasks import open_task, row_of
from peftcli.tasks.base import Task
from peftcli.train.checked import refuse_full_disk
from peftcli.train.data import Data, load_data, plan_of, prepare_config
from peftcli.train.devices.sharding import group_size, may_divide, processes_here, supports_quantization
from peftcli.train.events import Message, OnEvent, warning
from peftcli.train.forward import checkpoint_activations
from peftcli.train.memory.estimate import Estimate, bytes_written, estimate
from peftcli.train.plan import Plan
from peftcli.train.runs.folder import RunFolder
from peftcli.train.runs.resume import has_begun
from peftcli.train.runs.typed_json import to_json

_USED = 0.9
"""The share of the memory that an estimate may fill."""
_CHOSEN = {
    "per_device_train_batch_size": "training",
    "gradient_accumulation_steps": "training",
    "gradient_checkpointing": "training",
    "strategy": "launch",
}
"""Setting -> its section."""
_DECISIVE = ("base_model", "task", "method", "dataset")
"""Sections that decide what a run needs."""
_NUMBERS = "give numbers, true or false, and a strategy"
Settings = dict[str, Any]
"""Those of ``_CHOSEN`` by name."""


def settings_of(recipe: Recipe) -> Settings:
    """Return the settings of a recipe that may be left to the memory, as it has them."""
    return {key: getattr(getattr(recipe, section), key) for key, section in _CHOSEN.items()}


def first_auto(recipe: Recipe) -> str | None:
    """Return the key of the first setting that is on auto, or None if no setting is."""
    given = settings_of(recipe)
    return next((f"{section}.{key}" for key, section in _CHOSEN.items() if given[key] == "auto"), None)


def smallest(recipe: Recipe) -> Recipe:
    """Return the recipe with an example at once, if that is not chosen yet: for what does not depend on the choice."""
    least = {"per_device_train_batch_size": 1, "gradient_checkpointing": False, "strategy": "replicate"}
    given = settings_of(recipe)
    return with_settings(recipe, {key: least[key] if value == "auto" else value for key, value in given.items()})


def with_settings(recipe: Recipe, values: Settings) -> Recipe:
    """Return the recipe with settings that were chosen."""
    for key, section in _CHOSEN.items():
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **{key: values[key]})})
    return recipe


def with_chosen_settings(recipe: Recipe, accelerator: Accelerator, overwrite: bool, tell: OnEvent) -> Recipe:
    """Return the recipe with all settings chosen, by process 0: as the run that goes on has them, or as they fit.

    Raises:
        UsageError: it is not known what the model needs, or there is nothing to choose from.
    """
    if first_auto(recipe) is None:
        return recipe
    chosen: Settings = {}
    if accelerator.is_main_process:
        chosen = _settings_of_begun_run(recipe, overwrite) or _choose(recipe, accelerator.num_processes, tell)
    (chosen,) = broadcast_object_list([chosen])
    return with_settings(recipe, chosen)


def _settings_of_begun_run(recipe: Recipe, overwrite: bool) -> Settings | None:
    """The settings of the run in the folder, if the recipe's are still its; else None."""
    folder = RunFolder(Path(recipe.training.output_dir))
    for each in (folder.replacement(), folder) if overwrite else (folder,):
        record = each.read()
        if record is None or not has_begun(each, record):
            continue
        described = to_json(to_dict(recipe))
        if overwrite and any(described[section] != record.recipe.get(section) for section in _DECISIVE):
            continue  # the run that is replaced
        kept: Settings = {key: mapping_at(record.recipe, section).get(key) for key, section in _CHOSEN.items()}
        given = settings_of(recipe)
        if given["per_device_train_batch_size"] == "auto":
            sizes = kept["per_device_train_batch_size"], kept["gradient_accumulation_steps"]
            if not all(isinstance(size, int) for size in sizes) or prod(sizes) != given["gradient_accumulation_steps"]:
                return None
            given["gradient_accumulation_steps"] = kept["gradient_accumulation_steps"]
        settings = {key: kept[key] if value == "auto" else value for key, value in given.items()}
        return None if None in settings.values() else settings
    return None


def _choose(recipe: Recipe, num_processes: int, tell: OnEvent) -> Settings:
    tell(Message("finding what fits into the memory"))
    base = open_base(recipe.base_model)
    data = load_data(recipe, open_task(recipe, base), tell=tell)
    fits, needs = choose_settings(recipe, base, data, num_processes)
    there = _memory(recipe, num_processes)
    tell(Message(_account(recipe, fits, needs, there, num_processes)))
    if needs is not None and _in_step(needs) > there:
        tell(warning("the smallest of what can be chosen needs more memory than is free"))
    elif needs is not None and needs.evaluation > needs.step and needs.peak > there:
        least = f"an evaluation needs about {needs.peak / 2**30:.1f} GiB, more than is free"
        tell(warning(f"{least}: lower training.per_device_eval_batch_size"))
    return settings_of(fits)


def choose_settings(recipe: Recipe, base: OpenBase, data: Data, num_processes: int) -> tuple[Recipe, Estimate | None]:
    """Return the recipe with all settings chosen, and what it needs then: the fastest that fits, else the smallest.

    Raises:
        UsageError: it is not known what the model needs, or there is nothing to choose from.
    """
    given, key = settings_of(recipe), first_auto(recipe)
    sizes, total = _possible_sizes(recipe, data)

    def chosen(size: int, checkpointing: bool, strategy: str) -> Recipe:
        return with_settings(recipe, dict(zip(given, (size, total // size, checkpointing, strategy), strict=True)))

    def tried(size: int, checkpointing: bool, strategy: str) -> tuple[Recipe, Estimate]:
        fits = chosen(size, checkpointing, strategy)
        needs = _estimate(fits, base, data, num_processes)
        if needs is None:
            raise UsageError("the memory that this model needs cannot be estimated", key=key, hint=_NUMBERS)
        return fits, needs

    again = given["gradient_checkpointing"]
    strategies = _strategies(recipe, base, data, num_processes)
    ways = [(each, strategy) for strategy in strategies for each in ((False, True) if again == "auto" else (again,))]
    if len(ways) == len(sizes) == 1:
        return chosen(sizes[0], *ways[0]), None
    limit, last, refused = _memory(recipe, num_processes), None, None
    for way in ways:
        try:
            last = found = tried(sizes[0], *way)
        except ModelError as error:  # it cannot compute its activations again
            refused = error
            continue
        if _in_step(found[1]) > limit:
            continue
        low, high = 0, len(sizes)  # the first fits; whether the last does is not known
        while high - low > 1:
            middle = (low + high) // 2
            larger = tried(sizes[middle], *way)
            if _in_step(larger[1]) <= limit:
                low, found = middle, larger
            else:
                high = middle
        return found
    if last is None:
        assert refused is not None
        raise refused
    return last


def _possible_sizes(recipe: Recipe, data: Data) -> tuple[list[int], int]:
    """Return how many examples may be at once in the model, and how many a step has on a device."""
    given, key = settings_of(recipe), first_auto(recipe)
    size, steps = given["per_device_train_batch_size"], given["gradient_accumulation_steps"]
    if not data.task.divides:
        raise UsageError("auto is not for a task that compares the rows of a batch", key=key, hint=_NUMBERS)
    if size != "auto":
        return [size], size * steps
    if steps == 1:
        hint = "set training.gradient_accumulation_steps to the examples that a step has on a device"
        raise UsageError("auto divides training.gradient_accumulation_steps, which is 1", key=key, hint=hint)
    return [each for each in range(1, steps + 1) if steps % each == 0], steps


def _strategies(recipe: Recipe, base: OpenBase, data: Data, num_processes: int) -> Sequence[str]:
    """What processes may hold of the base model, the fastest first."""
    wanted = recipe.launch.strategy
    if wanted != "auto":
        return [wanted]
    weights_divide = supports_quantization("fsdp", base.weight_type) and not base.is_stored_quantised
    if num_processes == 1 or not (may_divide(data.task) and weights_divide):
        return ["replicate"]
    model = base.empty_model(row_of(recipe).of(base.config).auto_class, **data.task.model_options())
    if not any(stacks(model)):
        return ["replicate"]
    groups = 1 < group_size(replace(recipe.launch, strategy="hybrid"), num_processes) < num_processes
    return ["replicate", "hybrid", "fsdp"] if groups else ["replicate", "fsdp"]


def _in_step(needs: Estimate) -> int:
    """What a step needs, or on a GPU loading: the part that the choice changes."""
    loading = needs.file if needs.device == "cuda" else 0
    return needs.packages + needs.weights + max(loading, needs.adapter + needs.step)


def _memory(recipe: Recipe, num_processes: int) -> float:
    """Bytes that a process of this machine may fill, one of ``num_processes`` on all machines."""
    if torch.cuda.is_available():
        return _USED * torch.cuda.mem_get_info()[0]
    return _USED * (free_memory() / processes_here(recipe.launch, num_processes) + resident_memory())


def _estimate(recipe: Recipe, base: OpenBase, data: Data, num_processes: int) -> Estimate | None:
    """Estimate the memory of a recipe whose data is loaded."""
    model, config = _adapted(recipe, base, data)
    if recipe.training.gradient_checkpointing:
        checkpoint_activations(model, recipe)
    return estimate(model, config, recipe, base, data, plan_of(recipe, data, num_processes))


def check_disk(recipe: Recipe, base: OpenBase, data: Data, plan: Plan) -> None:
    """Check that the disk has room for what a run writes, before its model is loaded.

    Raises:
        StorageError: it has not.
    """
    with warnings.catch_warnings(), suppress(AdapterError, ModelError):  # they come again when the model is loaded
        warnings.simplefilter("ignore")
        model, _ = _adapted(recipe, base, data)
        refuse_full_disk(recipe, bytes_written(model, recipe.training, plan))


def _adapted(recipe: Recipe, base: OpenBase, data: Data) -> tuple[Any, AdapterConfig]:
    """Return the base model without values, with the recipe's adapter in it, and the adapter's config."""
    config, task = method_config(recipe), data.task
    prepare_config(config, base)
    options = task.model_options()
    model = base.empty_model(row_of(recipe).of(base.config).auto_class, **options)
    task.fit_model(model, config)
    config.task_type = row_of(recipe).task_type
    inject(model, config, initialised=parameters_of_heads(model) if options else [])
    return model, config


def _account(asked: Recipe, chosen: Recipe, needs: Estimate | None, there: float, num_processes: int) -> str:
    """What was chosen, and why, where ``there`` bytes may be filled."""
    training = chosen.training
    examples = f"{training.rows_at_once} of {training.rows_at_once * training.gradient_accumulation_steps} examples"
    again = ", activations computed again" if training.gradient_checkpointing else ""
    model = _placement(asked, chosen, num_processes, fits=needs is not None)
    known = f": about {_in_step(needs) / 2**30:.1f} of {there / 2**30:.1f} GiB" if needs else ""
    return f"memory: {examples} at once{again}{model}{known}"


def _placement(asked: Recipe, chosen: Recipe, num_processes: int, *, fits: bool) -> str:
    """What each process holds of the base model, and if that was chosen, why."""
    strategy, size = chosen.launch.strategy, group_size(chosen.launch, num_processes)
    here = processes_here(chosen.launch, num_processes)
    if strategy in DIVIDED:
        model = f", the base model divided{f' among each {size} processes' if strategy == 'hybrid' else ''}"
        why = ", since it does not fit whole"
        if strategy == "hybrid":
            why += ": only the adapter's gradients leave such a group"
        elif here < num_processes:
            why += f"{' nor within a machine' if here > 1 else ''}: every layer crosses the network"
        return f"{model}{why}" if asked.launch.strategy == "auto" else model
    if asked.launch.strategy != "auto":
        return ""
    why = "it fits" if fits else "there is only one" if num_processes == 1 else "it cannot be divided"
    return f", the base model whole in each process, since {why}"


_TO_GO_ON = ". To go on at the last checkpoint, add --allow-change KEY"


def peak_memory_bytes() -> dict[str, int]:
    """The peak memory of this process: resident, and on the GPU if there is one."""
    peak = {"rss": peak_resident_memory()}
    if torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def too_large_a_step(step: int, sizes: Sequence[int], recipe: Recipe, task: Task[Any], *, saved: bool) -> OutOfMemory:
    """The error of a step that the memory did not hold.

    ``sizes`` are those of the examples that were in the model at once when most were, in the task's unit; ``saved``:
    there is a checkpoint.
    """
    longest = f" with {sum(sizes):,} {task.unit}, {max(sizes):,} in the longest" if max(sizes) > 1 else ""
    batch = f"{len(sizes):,} example{'s' if len(sizes) > 1 else ''} at once{longest}"
    hint = f"{_cheapest(recipe, task, len(sizes))}{_TO_GO_ON * saved}"
    return OutOfMemory(f"not enough memory for step {step}, {_peak()}: {batch}", hint=hint)


def too_large_an_evaluation(recipe: Recipe, *, saved: bool) -> OutOfMemory:
    """The error of an evaluation that the memory did not hold. ``saved``: there is a checkpoint."""
    size = recipe.training.per_device_eval_batch_size
    less = f"training.per_device_eval_batch_size: {size // 2}" if size > 1 else "leave out the largest examples"
    message = f"not enough memory to evaluate, {_peak()}: a batch of {size:,} examples"
    return OutOfMemory(message, hint=f"{less}{_TO_GO_ON * saved}")


def _peak() -> str:
    peak = peak_memory_bytes()
    return f"after a peak of {peak.get('cuda', peak['rss']) / 2**30:.1f} GiB"


def _cheapest(recipe: Recipe, task: Task[Any], at_once: int) -> str:
    """The three changes that cost least, the cheapest first, where ``at_once`` examples in the model are too many."""
    training = recipe.training
    size, steps = training.rows_at_once, training.gradient_accumulation_steps
    parts = next((count for count in range(2, size + 1) if size % count == 0 and size // count < at_once), 1)
    fewer = f"training.per_device_train_batch_size: {size // parts}"
    same = f"{fewer} with gradient_accumulation_steps: {steps * parts}, the same batch in smaller parts"
    changes = {
        # a task that compares the rows of a batch learns less from fewer
        same if task.divides else fewer: parts > 1,
        "training.gradient_checkpointing: true, about a third slower": not training.gradient_checkpointing,
        "training.gradient_checkpointing: offload": training.gradient_checkpointing is True
        and torch.cuda.is_available(),
        "training.bf16: true": training.bf16 is False,
        "a smaller dataset.max_length": task.unit == "tokens",
        "base_model.quantization: nf4": recipe.base_model.quantization is None,
    }
    return "; or ".join(islice((text for text, helps in changes.items() if helps), 3))
