"""The parts of a run, built from its recipe: accelerator and model."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, set_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from peftcli.adapters.load import AdapterSource
from peftcli.adapters.number_format import has_bf16
from peftcli.core.config import AdapterConfig
from peftcli.core.files import begin_from_adapter
from peftcli.core.heads import widen_heads
from peftcli.core.inject import Injection, inject
from peftcli.core.layer import adapter_layers, base_modules
from peftcli.core.protocols import Calibrates, StartsFromBase, layers_of
from peftcli.core.quantised import is_quantised, num_weights
from peftcli.core.targets import expert_parameters
from peftcli.core.weights import named_tensors
from peftcli.data.store import View
from peftcli.errors import ModelError, UsageError
from peftcli.models.conversions import warn_of_peft
from peftcli.models.open import LoadedModel
from peftcli.models.weights import BaseWeights
from peftcli.schema import Recipe
from peftcli.system.addresses import notice_lost_machines, on_several_machines, use_interface_to
from peftcli.tasks import row_of
from peftcli.tasks.base import FitsModel, Task, refuse_other_classes, with_trained_head
from peftcli.tasks.scores import model_inputs, on_device
from peftcli.train.data import Data, prepare_config
from peftcli.train.devices.kernels import use_liger_kernel
from peftcli.train.devices.launch import started_by_peftcli
from peftcli.train.devices.sharding import load_by_first
from peftcli.train.devices.strategies import STAGES, is_dividing
from peftcli.train.devices.zero import ZeroModel, start_engine
from peftcli.train.init_adapter import its_base_named
from peftcli.train.loop import PreparedModel
from peftcli.train.optim import build_optimizer, build_schedule, keep_embeddings_exact, parameter_groups
from peftcli.train.plan import Plan

_PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others."""


def start_accelerator(recipe: Recipe) -> Accelerator:
    """The devices of this process and its place among the others.

    Raises:
        UsageError: fewer processes were started than were asked for.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if not torch.cuda.is_available():  # or DeepSpeed says on stdout, wherever it is installed, that it has found none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UsageError(
            "accelerate was asked for several processes and started one",
            hint="add --multi_gpu, on the CPU too; or set launch.num_processes and run peftcli by itself",
        )
    if on_several_machines():
        use_interface_to(os.environ.get("MASTER_ADDR", ""))
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)  # or accelerate divides what the loop has divided
    precision = "bf16" if uses_bf16(recipe) else "no"
    if asked == 1 and is_initialized() and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # or accelerate refuses another precision than that of this process's last run
    with nullcontext() if asked == 1 else _nothing_on_stdout():
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=not torch.cuda.is_available(),
            # evaluation runs out of step; and not every step uses all that trains
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True),
                InitProcessGroupKwargs(timeout=_PATIENCE),  # of NCCL 10 minutes, in which process 0 may encode the data
            ],
        )
    if on_several_machines():
        notice_lost_machines(unanswered=accelerator.device.type == "cpu")
    if accelerator.device.type == "cpu":  # of several processes accelerate calls it cpu:0, to which weights are copied
        PartialState().device = accelerator.state.device = torch.device("cpu")
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        hint = "launch.strategy: fsdp, zero2 or zero3 in the recipe, and accelerate without it"
        raise UsageError("accelerate was told to use Megatron-LM, which peftcli does not", hint=hint)
    wanted, started = recipe.launch.num_processes, accelerator.num_processes
    if started < asked:
        raise UsageError(f"{asked} processes were asked for and {started} started")
    if wanted != "auto" and not started_by_peftcli() and started != wanted * recipe.launch.num_machines:
        message = f"the recipe wants {wanted * recipe.launch.num_machines} processes, the launcher started {started}"
        raise UsageError(message, key="launch.num_processes")
    return accelerator


@contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """Inside, not even C++ prints there, where ``--json`` has its object: torch 2.10's gloo says who is connected."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def uses_bf16(recipe: Recipe) -> bool:
    """Whether the forward pass computes in bfloat16: as the recipe says, or if the device has arithmetic for it."""
    if recipe.training.bf16 != "auto":
        return recipe.training.bf16
    return has_bf16()


def base_dtype(recipe: Recipe) -> torch.dtype:
    """Number format of the frozen weights."""
    if recipe.base_model.dtype == "auto":
        return torch.bfloat16 if uses_bf16(recipe) else torch.float32
    dtype: torch.dtype = getattr(torch, recipe.base_model.dtype)
    return dtype


def refuse_attention(recipe: Recipe) -> None:
    """Raise UsageError where flash attention is asked for and computes nothing in half precision."""
    halves = uses_bf16(recipe) or base_dtype(recipe) != torch.float32
    if "flash" in (recipe.base_model.attn_implementation or "") and not halves:
        hint = "set training.bf16: true, or base_model.dtype: bfloat16"
        raise UsageError("flash attention does not compute in float32", key="base_model.attn_implementation", hint=hint)


def load_base(recipe: Recipe, task: Task[Any]) -> LoadedModel:
    """The recipe's base model as its task wants it.

    Raises:
        ModelError: it cannot be loaded.
    """

    def load(dtype: torch.dtype | Literal["auto"]) -> LoadedModel:
        return task.base.model(row_of(recipe).auto_class, dtype, **task.model_options())

    refuse_attention(recipe)
    by_first = is_dividing(recipe) and recipe.launch.cpu_ram_efficient_loading
    return load_by_first(load, base_dtype(recipe)) if by_first else load(base_dtype(recipe))


def adapted_model(
    recipe: Recipe,
    config: AdapterConfig,
    task: Task[Any],
    source: AdapterSource | None,
    load: Callable[[Recipe, Task[Any]], LoadedModel],
) -> tuple[nn.Module, Injection, list[str]]:
    """The recipe's base model as the task needs it, with its adapter in it, and what the user should know.

    The adapter begins as ``source``, or is a new one. ``load`` loads the base model.

    Raises:
        ModelError: the base model cannot be loaded.
        DataError: the adapter to begin from has a head of other classes.
        AdapterError: the method's settings do not fit it, or the adapter to begin from does not.
    """
    set_seed(recipe.training.seed)  # a new head starts from it
    base, loaded = recipe.base_model, load(recipe, task)
    if source is None:
        loaded = with_trained_head(loaded, task)
    model, notes = loaded.model, [loaded.note] if loaded.note else []
    if base.quantization and (note := unquantised_experts(model, base.quantization.type)):
        notes.append(note)
    if recipe.training.use_liger_kernel:
        use_liger_kernel(model)
    if isinstance(task, FitsModel):
        notes += task.fit_model(model, config)
    set_seed(recipe.training.seed)
    config.task_type = row_of(recipe).task_type
    config.note_base_class(model)
    config.base_model_name_or_path, config.revision = base.name, base.revision
    prepare_config(config, task.base)
    if source is not None:
        refuse_other_classes(task.model_options(), source.recorded_options, source.folder)
        with its_base_named(source, recipe):
            injection = begin_from_adapter(model, config, source.folder, initialised=loaded.initialised)
    else:
        injection = inject(model, config, initialised=loaded.initialised)
        if isinstance(method := layers_of(config), StartsFromBase) and method.needs_base_weights(config):
            method.start_from_base(model, config, BaseWeights(task.base, getattr(model, "base_model_prefix", "")))
    widen_heads(model)
    warn_of_peft(model, config, named_tensors(model))
    if recipe.training.gradient_checkpointing:
        checkpoint_activations(model)
    return model, injection, notes


def checkpoint_activations(model: Any) -> None:
    """Let a model compute its activations again in the backward pass.

    Raises:
        ModelError: it cannot.
    """
    # under the name of transformers 5.24 and later, or the one before
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(str(error), key="training.gradient_checkpointing") from None


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
    if isinstance(method := layers_of(config), Calibrates):
        method.calibrate(model, config, CalibrationBatches(data.train, data.task, accelerator.device))
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
