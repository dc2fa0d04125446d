"""A base model that is divided among the processes: of the weights of its layers each keeps a part (FSDP2).

A layer is whole in a process while it computes, forward and backward. Embedding, head, norms outside the layers, and
the adapter are whole in every process. So what trains are tensors like those of a run without it, and so are the sum of
gradients, the optimizer and the checkpoints. All processes must run the model equally often, since each needs the
others' parts.

With ``hybrid`` the processes form groups, as those of a machine are. The base model is divided within a group, and the
same in each. Between groups only the adapter's gradients are sent, which the loop adds up.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast_object_list, gather_object
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from transformers import PreTrainedModel

from peftcli.core.config import AdapterConfig
from peftcli.core.layer import adapter_layers, base_module
from peftcli.core.protocols import layers_of
from peftcli.core.quantised import in_four_bits, is_quantised, keep_scales
from peftcli.errors import ModelError, UsageError
from peftcli.models.base import LoadedModel
from peftcli.models.parts import stacks
from peftcli.schema import DIVIDED, SHARDED, Launch, Recipe
from peftcli.system.memory import give_back_freed
from peftcli.tasks.base import Begins, Task, require_extra

_KEY = "launch.strategy"


def load_by_first(load: Callable[[Any], LoadedModel], dtype: torch.dtype, launch: Launch) -> LoadedModel:
    """Load a model in a group's first process, and one of zeros in the others, until ``shard`` or DeepSpeed sends it.

    ``load`` loads it in a number format: the first process in ``dtype``, to compute in; the others in that of the
    files, ``auto``, which maps them, so that nobody reads them there.
    """
    is_first = torch.distributed.get_rank() % group_size(launch, torch.distributed.get_world_size()) == 0
    loaded = load(dtype if is_first else "auto")
    parameters, buffers = dict(loaded.model.named_parameters()), dict(loaded.model.named_buffers())
    (dtypes,) = broadcast_object_list([{name: value.dtype for name, value in (parameters | buffers).items()}])
    for name, value in buffers.items():
        value.data = value.data.to(dtypes[name])
    for name, value in parameters.items() if not is_first else ():
        zeros = torch.from_numpy(np.zeros(value.numel() * dtypes[name].itemsize, np.uint8))  # without a page of it
        value.data = zeros.view(dtypes[name]).view(value.shape)
    return loaded


def shard(model: nn.Module, device: torch.device, launch: Launch, *, only_decoder: bool = False) -> None:
    """Divide the layers of a model among the processes of each group, in place. An adapter in it stays whole.

    The model is on the CPU, and computes on ``device``. With ``cpu_offload`` the parts are in the CPU's memory until
    they are gathered; with ``cpu_ram_efficient_loading`` the model of a group's first process is that of the group.
    With ``only_decoder`` what stands beside the decoder stays whole: processes would wait there for one whose batch
    does not run it.

    Raises:
        ModelError: it has no stack of layers, quantised weights that cannot be split, or, if the first process
            sends its values, other shapes there.
    """
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY  # its own, so not where other runs need it

    found, send = check_divisible(model, launch.strategy, only_decoder=only_decoder), launch.cpu_ram_efficient_loading
    if device.type == "cpu":  # where layers are allocated and freed all the time
        give_back_freed()
    for each in filter(in_four_bits, model.modules()):
        keep_scales(each)
    mesh = _mesh(device, launch)
    group = mesh.get_group(mesh.ndim - 1)
    if send:
        _refuse_other_shapes(model)
    whole = _whole(model, [layer for _, layers in found for layer in layers])
    # the same order in all; and not as a view of the file, of which the layers would stay in memory too
    for value in (*(each for each in model.parameters() if each in whole), *model.buffers()):
        value.data = value.data.to(device, copy=True)
        if send:
            torch.distributed.broadcast(value.data, group=group, group_src=0)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=launch.reshard_after_forward,
        cpu_offload=CPUOffloadPolicy(pin_memory=device.type != "cpu") if launch.cpu_offload else OffloadPolicy(),
    )
    options = {"reshard_after_forward": plugin.reshard_after_forward, "offload_policy": plugin.cpu_offload}
    for module, layers in reversed(found):  # a stack that another one's module holds comes first
        for each in (*layers, module):
            for value in each.parameters() if send and each is not module else ():
                if value not in whole:
                    value.data = value.data.to(device)
                    torch.distributed.broadcast(value.data, group=group, group_src=0)
            fully_shard(each, mesh=mesh, ignored_params=whole, **options)
    # a change in place may lose a hook that gathers, and torch warns; what holds the layers has nothing to gather
    for module, _ in found:
        warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \({type(module).__name__}\) returned a view tensor")
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            vars(part)["_is_fsdp_managed_module"] = True  # generates until the last process is ready
            # by its class, of which fully_shard has made another
            _CAN_RECORD_REGISTRY.update({str(type(part)): part._can_record_outputs})


def _mesh(device: torch.device, launch: Launch) -> DeviceMesh:
    """The processes that divide a model, in the last dimension; with hybrid in the first one those that have one part.

    Processes are numbered machine by machine.
    """
    count = torch.distributed.get_world_size()
    size = group_size(launch, count)
    if launch.strategy != "hybrid":
        return init_device_mesh(device.type, (count,))
    return init_device_mesh(device.type, (count // size, size), mesh_dim_names=("replicate", "shard"))


def _refuse_other_shapes(model: nn.Module) -> None:
    """Raise ModelError where the first process's model has other shapes than that of another one."""
    shapes = [(name, tuple(value.shape)) for name, value in (*model.named_parameters(), *model.named_buffers())]
    if any(others != shapes for others in gather_object([shapes])):
        text = "is not for a method whose shapes depend on the base model's weights, which only the first process has"
        raise ModelError(text, key="launch.cpu_ram_efficient_loading")


def check_divisible(
    model: nn.Module, strategy: str, *, only_decoder: bool = False
) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Return the stacks of layers to divide: all, or those of the decoder.

    Raises:
        ModelError: the model has no stack, drops layers at random, or has quantised weights that cannot be divided.
    """
    found = list(stacks(model))
    if not isinstance(model, PreTrainedModel) or not found:
        raise ModelError(f"{strategy} divides the layers of a stack, which this model does not have", key=_KEY)
    divides = in_four_bits if strategy in SHARDED else lambda module: False
    if any(is_quantised(module) and not divides(module) for module in model.modules()):
        raise ModelError(f"{strategy} cannot divide these quantised weights", key=_KEY)
    if any(getattr(model.config, name, 0) for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")):
        raise ModelError(f"{strategy} is not for models of which each process drops layers of its own", key=_KEY)
    within = set(model.get_decoder().modules()) if only_decoder else {module for module, _ in found}
    return [(module, layers) for module, layers in found if module in within]


def is_sharded(model: nn.Module) -> bool:
    """Whether a model is divided, by FSDP2 or by DeepSpeed."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    )


def _whole(model: nn.Module, layers: list[nn.Module]) -> set[nn.Parameter]:
    """The parameters outside the layers, those that train, and those that adapters have of their own."""
    divided = {parameter for layer in layers for parameter in layer.parameters() if not parameter.requires_grad}
    for layer in adapter_layers(model).values():
        divided -= set(layer.parameters()) - set(base_module(layer).parameters())
    return set(model.parameters()) - divided


STAGES = {"zero2": 2, "zero3": 3}
"""launch.strategy -> the stage of ZeRO."""
_ENGINES = ("ddp", "zero2", "zero3")
_QUANTISED = {**dict.fromkeys(SHARDED, ("nf4", "fp4")), "zero3": ()}
"""launch.strategy -> the quantised weights that it can divide: their scales stand beside them, whole."""
_NOT_WHOLE = {"zero2": ("int8_weight_only", "int4_weight_only", "torchao")}
"""launch.strategy -> those that it cannot even hold whole."""
_ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Values of training.optim that update each number by itself."""


def is_dividing(recipe: Recipe) -> bool:
    """Whether this process and others divide the base model among them."""
    return torch.distributed.is_initialized() and group_size(recipe.launch, torch.distributed.get_world_size()) > 1


def processes_here(launch: Launch, num_processes: int) -> int:
    """Return how many of all processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_processes // launch.num_machines))


def group_size(launch: Launch, num_processes: int) -> int:
    """Return how many of all processes divide a base model among them; 1: each has a whole one."""
    if launch.strategy == "hybrid":
        return processes_here(launch, num_processes) if launch.shard_size == "auto" else launch.shard_size
    return num_processes if launch.strategy in DIVIDED else 1


def refuse_groups(launch: Launch, num_processes: int) -> None:
    """Check that the groups of ``hybrid`` are of one size and none is on several machines. All processes check at once.

    Raises:
        UsageError: they are not.
    """
    if launch.strategy != "hybrid":
        return
    here, size, key = processes_here(launch, num_processes), group_size(launch, num_processes), "launch.shard_size"
    places = [(here, size, 0)]
    if torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
        places = gather_object([(here, size, (rank - int(os.environ.get("LOCAL_RANK", rank))) % size)])
    for here, size, _ in places:
        if here % size:
            raise UsageError(f"must divide the {here} processes of a machine, and is {size}", key=key)
    if len(sizes := sorted({size for _, size, _ in places})) > 1:
        hint = "set it to one number that divides the processes of each machine"
        raise UsageError(f"is {sizes[0]} on one machine and {sizes[1]} on another", key=key, hint=hint)
    if any(shift for _, _, shift in places):
        hint = "let the launcher number processes machine by machine, as srun --distribution=block does"
        raise UsageError("would put processes of different machines into one group", key=key, hint=hint)


def may_divide(task: Task[Any]) -> bool:
    """Whether the model of a task can be divided: one of texts, if the task does not compare the rows of a batch."""
    return task.unit == "tokens" and not task.gathers


def supports_quantization(strategy: str, weight_type: str | None) -> bool:
    """Whether a strategy is for weights that are quantised so, or not at all."""
    if weight_type is None:
        return True
    divides = strategy not in _QUANTISED or weight_type in _QUANTISED[strategy]
    return divides and weight_type not in _NOT_WHOLE.get(strategy, ())


def refuse_strategy(recipe: Recipe, task: Task[Any], config: AdapterConfig, num_processes: int) -> None:
    """Check that the recipe's strategy works for its task, its method and the number of processes.

    Raises:
        UsageError: it is not, or DeepSpeed is not installed.
    """
    strategy, method, weight_type = recipe.launch.strategy, layers_of(config), task.base.weight_type
    weights_fit = supports_quantization(strategy, weight_type)
    refused = (
        ((*_QUANTISED, *_NOT_WHOLE), not weights_fit, f"is not for {weight_type}"),
        (DIVIDED, not may_divide(task), "divides models of texts, whose task does not compare the rows of a batch"),
        (_ENGINES, task.gathers, "is not for tasks that compare the rows of all processes"),
        (("zero3",), task.skips_parts, "is not for tasks of which some batches run a part of the model alone"),
        (("zero3",), isinstance(task, Begins), "is not for tasks that compare the model with what it was"),
        (("zero3",), config.reads_past_calls(), "is for LoRA without its variants: other methods read divided weights"),
        (("zero2", "zero3"), "after_step" in vars(method), "leaves no gradients, which the method reads after a step"),
    )
    for strategies, is_so, text in refused:
        if strategy in strategies and is_so:
            hint = "launch.strategy: replicate"
            raise UsageError(f"{strategy} {text}", key="launch.strategy", hint=hint)
    if strategy in DIVIDED and recipe.launch.cpu_offload and group_size(recipe.launch, num_processes) == 1:
        raise UsageError("one process has no part of the model to offload", key="launch.cpu_offload")
    if strategy in STAGES and recipe.training.optim not in _ELEMENTWISE:
        text = f"{strategy} divides what adamw_torch and sgd remember, and no other optimizer"
        raise UsageError(text, key="training.optim")
    if strategy in STAGES and num_processes > 1:
        require_extra("deepspeed", "deepspeed", "launch.strategy", UsageError)
