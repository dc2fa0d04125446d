"""The model of a run, built from its recipe: loaded, with its adapter, placed on the devices."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from peftcli.adapters.begin import begin_from_adapter
from peftcli.adapters.load import AdapterSource
from peftcli.core.config import AdapterConfig
from peftcli.core.inject import Injection, inject
from peftcli.core.layer import adapter_layers, base_modules
from peftcli.core.protocols import layers_of, needs_batches
from peftcli.core.quantised import is_quantised, num_weights
from peftcli.core.targets import expert_parameters
from peftcli.core.weights import named_tensors
from peftcli.data.store import View
from peftcli.errors import UsageError
from peftcli.models.conversions import warn_of_peft
from peftcli.models.open import BaseWeights, LoadedModel
from peftcli.models.parts import widen_heads
from peftcli.recipe import FORGETTING, forgets_rows, method_config
from peftcli.schema import SHARDED, Recipe
from peftcli.tasks import row_of
from peftcli.tasks.base import Begins, Task, model_inputs, on_device, refuse_other_classes, with_trained_head
from peftcli.tasks.text.fast.norms import fuse_norms
from peftcli.train.batches import BatchForm
from peftcli.train.data import Data, RunData, prepare_config
from peftcli.train.devices.accelerator import base_dtype, refuse_attention
from peftcli.train.devices.sharding import (
    STAGES,
    group_size,
    is_dividing,
    load_by_first,
    refuse_groups,
    refuse_strategy,
    shard,
)
from peftcli.train.devices.zero import ZeroModel, start_engine
from peftcli.train.events import Message
from peftcli.train.forward import change_forward, checkpoint_activations, use_liger_kernel
from peftcli.train.init_adapter import find_init_adapter, its_base_named, refuse_other_base
from peftcli.train.loop import Gradients, PreparedModel
from peftcli.train.memory.fit import check_disk
from peftcli.train.optim import (
    build_optimizer,
    build_schedule,
    check_optimizer,
    keep_embeddings_exact,
    parameter_groups,
)
from peftcli.train.plan import Plan
from peftcli.train.runs.checkpoint import State
from peftcli.train.runs.record import ParametersRecord
from peftcli.train.runs.resume import Run, commit_of


def load_base(recipe: Recipe, task: Task[Any]) -> LoadedModel:
    """The recipe's base model as its task wants it.

    Raises:
        ModelError: it cannot be loaded.
    """

    def load(dtype: torch.dtype | Literal["auto"]) -> LoadedModel:
        return task.base.model(row_of(recipe).of(task.base.config).auto_class, dtype, **task.model_options())

    refuse_attention(recipe)
    by_first = is_dividing(recipe) and recipe.launch.cpu_ram_efficient_loading
    return load_by_first(load, base_dtype(recipe), recipe.launch) if by_first else load(base_dtype(recipe))


def adapted_model(
    recipe: Recipe,
    config: AdapterConfig,
    task: Task[Any],
    source: AdapterSource | None,
    load: Callable[[Recipe, Task[Any]], LoadedModel],
) -> tuple[nn.Module, Injection, list[str]]:
    """The recipe's base model as the task needs it, with its adapter in it, and what the user should know.

    The adapter begins as ``source``, or is a new one. ``load`` loads the base model.
    """
    set_seed(recipe.training.seed)  # a new head starts from it
    base, loaded = recipe.base_model, load(recipe, task)
    if source is None:
        loaded = with_trained_head(loaded, task)
    task.head_is_new = bool(loaded.initialised)
    if task.head_is_new and recipe.gates.get(FORGETTING, False) is not False and forgets_rows(recipe):
        message = f"{base.name} has no trained head for the task: it guesses, and has no right rows to forget"
        raise UsageError(message, key=f"gates.{FORGETTING}", hint="remove the gate")
    model, notes = loaded.model, [loaded.note] if loaded.note else []
    if base.quantization and (note := unquantised_experts(model, base.quantization.type)):
        notes.append(note)
    if recipe.training.use_liger_kernel:
        use_liger_kernel(model)
    notes += task.fit_model(model, config)
    set_seed(recipe.training.seed)
    config.task_type = row_of(recipe).task_type
    config.note_base_class(model)
    config.base_model_name_or_path, config.revision = base.name, base.revision
    prepare_config(config, task.base)
    if source is not None:
        refuse_other_classes(task, source.recorded_options, source.recorded_settings, source.folder)
        with its_base_named(source, recipe):
            injection = begin_from_adapter(model, config, source.folder, initialised=loaded.initialised)
    else:
        injection = inject(model, config, initialised=loaded.initialised)
        method = layers_of(config)
        if method.needs_base_weights(config):
            method.start_from_base(model, config, BaseWeights(task.base, getattr(model, "base_model_prefix", "")))
    widen_heads(model)
    warn_of_peft(model, config, named_tensors(model))
    fuse_norms(model)
    if recipe.training.gradient_checkpointing:
        checkpoint_activations(model, recipe)
    return model, injection, notes


_NEAR = 64
"""Rows that are grouped by length together to calibrate."""
_AT_ONCE = 8
"""The most rows of a batch to calibrate."""


@dataclass(frozen=True)
class CalibrationBatches:
    """The training rows as the model takes them, in batches; for ``calibrate``.

    They depend on the rows alone, so that every process starts the same adapter, and any division of a global batch
    does. Rows near one another are grouped by length to save padding, and the groups shuffled. With its padding a batch
    is no larger than the largest row, for which there must be memory anyway.
    """

    examples: View
    task: Task[Any]
    device: torch.device

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        sizes = self.examples.sizes.tolist()
        largest = max(sizes)
        for first in range(0, len(sizes), _NEAR):
            batches: list[list[int]] = [[]]
            for at in sorted(range(first, min(first + _NEAR, len(sizes))), key=sizes.__getitem__):
                count = len(batches[-1])
                if count == _AT_ONCE or (count + 1) * sizes[at] > largest:
                    batches.append([])
                batches[-1].append(at)
            random.Random(first).shuffle(batches)
            for rows in batches:
                batch = self.task.collate([self.examples[at] for at in rows], training=False)
                yield model_inputs(on_device(batch, self.device))


def calibrate(
    model: nn.Module,
    injection: Injection,
    config: AdapterConfig,
    data: Data,
    accelerator: Accelerator,
) -> Injection:
    """Let the method start the adapter from the training data. Gives what is in the model then: sizes may change."""
    model.to(accelerator.device)
    layers_of(config).calibrate(model, config, CalibrationBatches(data.train, data.task, accelerator.device))
    trainable = sum(parameter.numel() for _, _, parameter in named_tensors(model).values())
    return Injection(adapter_layers(model), trainable, injection.total - injection.trainable + trainable)


def prepare(
    model: nn.Module, config: AdapterConfig, recipe: Recipe, plan: Plan, accelerator: Accelerator
) -> PreparedModel:
    """Model, optimizer and schedule, placed on the devices by accelerate."""
    if recipe.launch.strategy == "ddp":  # the base is the same everywhere, and not sent
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    # by default without DDP: the loop adds the gradients up, or DeepSpeed does
    several, strategy = accelerator.num_processes > 1, recipe.launch.strategy
    to_device = not is_dividing(recipe)  # or the engine does it
    prepared = accelerator.prepare_model(model, device_placement=to_device, evaluation_mode=strategy != "ddp")
    tensors = named_tensors(model)
    parameters = [parameter for _, _, parameter in tensors.values()]
    if several:
        for parameter in parameters:  # the same seed started the same adapter; a GPU may differ in a last bit
            parameter.data = parameter.data.to(accelerator.device)
            torch.distributed.broadcast(parameter.data, 0)
    optimizer = build_optimizer(parameter_groups(tensors, recipe.training), recipe.training)
    keep_embeddings_exact(optimizer, tensors)
    schedule = build_schedule(optimizer, recipe.training, plan.total_steps)
    # from here on each process draws its own dropout
    set_seed((recipe.training.seed + accelerator.process_index) % 2**32)
    optim, kind = f"{recipe.training.optim} {recipe.training.optim_args}", PreparedModel
    if strategy in STAGES and several:
        prepared = start_engine(model, parameters, optimizer, recipe.launch, recipe.training.max_grad_norm)
        kind = ZeroModel
    return kind(prepared, parameters, optimizer, schedule, config, optim)


def unquantised_experts(model: nn.Module, kind: str) -> str | None:
    """Return a note on the experts that a quantised model holds as parameters, in full; None without any."""
    names = expert_parameters(base_modules(model))
    if not names:
        return None
    share = 1 - sum(num_weights(each) for each in model.modules() if is_quantised(each)) / num_weights(model)
    return f"{share:.0%} of the weights are not quantised: {kind} takes linear layers, not {' and '.join(names)}"


class RunResources:
    """Provides a run's base model and gradients: its own, or those of a group (``together.Member``)."""

    def load(self, recipe: Recipe, task: Task[Any]) -> LoadedModel:
        """Load the base model."""
        return load_base(recipe, task)

    def check(self, model: nn.Module, config: AdapterConfig) -> None:
        """Check the model that was built, before run.json records the start."""

    def gradients_of(self, run: Run, data: RunData, state: State) -> Gradients:
        """Return what computes the gradients of the steps to come."""
        return Gradients(data, state.prepared, run.accelerator, state.progress.step)


@dataclass(frozen=True)
class BuiltModel:
    """The model, ready to train, and what run.json records of it."""

    prepared: PreparedModel
    parameters: ParametersRecord
    efficiency: float
    """Share of a batch that is not padding."""
    source: AdapterSource | None
    """The adapter that training begins from."""


def build(run: Run, data: RunData, host: RunResources) -> BuiltModel:
    """Load the base model, inject the adapter, calibrate it where the method needs data, and place all on the devices.

    Raises:
        ModelError: the base model cannot be loaded.
        AdapterError: the method's settings do not fit it.
    """
    config = method_config(run.recipe)
    recipe = _checked_recipe(run, data, config)
    run.tell(Message(f"loading {recipe.base_model.name}"))
    source = find_init_adapter(recipe)
    model, injection = _start_adapter(run, recipe, config, data, source, host)
    if recipe.launch.strategy in SHARDED and is_dividing(recipe):
        count = run.accelerator.num_processes
        size = group_size(recipe.launch, count)
        each = f", and the same in {count // size} groups" if size < count else ""
        run.tell(Message(f"dividing the base model's layers among {size} processes{each}"))
        shard(model, run.accelerator.device, recipe.launch, only_decoder=data.task.skips_parts)
    prepared = prepare(model, config, recipe, data.plan, run.accelerator)
    data.task.check_model(model)
    if isinstance(data.task, Begins):
        data.task.begin(model, from_adapter=source is not None)
    if note := change_forward(model, config, recipe, data, run.accelerator):
        run.tell(Message(note))
    form = BatchForm.of(model, data.task, config, data.plan, in_step=prepared.in_step)
    parameters = ParametersRecord(trainable=injection.trainable, all=injection.total)
    return BuiltModel(prepared, parameters, form.efficiency(data.plan, data.examples.train), source)


def _checked_recipe(run: Run, data: RunData, config: AdapterConfig) -> Recipe:
    """Check what needs no model, warn of settings that have no effect, and return the recipe without them."""
    recipe, num_processes = run.pinned, run.accelerator.num_processes
    refuse_strategy(recipe, data.task, config, num_processes)
    check_optimizer(recipe.training)
    refuse_groups(recipe.launch, num_processes)
    strategy, divide = recipe.launch.strategy, group_size(recipe.launch, num_processes)
    if (strategy in SHARDED and divide == 1) or (strategy in STAGES and num_processes == 1):
        where = "" if num_processes == 1 else " on each machine"
        run.warn(f"launch.strategy: {strategy} divides nothing, since there is one process{where}")
    if recipe.launch.cpu_ram_efficient_loading and needs_batches(config):
        run.warn("each process reads the base model, to start the adapter from data")
        recipe = replace(recipe, launch=replace(recipe.launch, cpu_ram_efficient_loading=False))
    if recipe.training.offloads and run.accelerator.device.type == "cpu":
        run.warn("training.gradient_checkpointing: offload moves nothing on a CPU; MLPs compute long rows in pieces")
    if run.is_main:
        check_disk(recipe, data.task.base, data.examples, data.plan)
    return recipe


def _start_adapter(
    run: Run, recipe: Recipe, config: AdapterConfig, data: RunData, source: AdapterSource | None, host: RunResources
) -> tuple[nn.Module, Injection]:
    """Load the model with its adapter, from where training starts it: ``source``, the method's start, or the data."""
    model, injection, notes = adapted_model(recipe, config, data.task, source, host.load)
    config.revision = run.recipe.base_model.revision
    if source is not None:
        base_hash = run.identity.base_model or commit_of(recipe.base_model).get("sha256")
        refuse_other_base(source, recipe, base_hash)
    for note in notes:
        run.warn(note)
    if data.task.adapts:
        run.tell(Message(data.task.adapts))
    if config.modules_to_save:
        run.tell(Message(f"training in full: {', '.join(config.modules_to_save)}"))
    if needs_batches(config):
        run.tell(Message("calibrating the adapter on the training data"))
        injection = calibrate(model, injection, config, data.examples, run.accelerator)
    return model, injection
