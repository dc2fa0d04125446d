"""A base model that is divided among the processes: of the weights of its layers each keeps a part (FSDP2).

A layer is whole in a process while it computes, forward and backward. Embedding, head, norms outside the layers, and
the adapter are whole in every process. So what trains are tensors like those of a run without it, and so are the sum of
gradients, the optimizer and the checkpoints. All processes must run the model equally often, since each needs the
others' parts.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from transformers import PreTrainedModel

from peftcli.core.layer import adapter_layers, base_module
from peftcli.core.quantised import is_quantised
from peftcli.errors import ModelError
from peftcli.models.stacks import stacks
from peftcli.system.memory import give_back_freed

_KEY = "launch.strategy"


def shard(model: nn.Module, device: torch.device, *, cpu_offload: bool = False) -> None:
    """Divide the layers of a model among all processes, in place. An adapter in it stays whole.

    ``cpu_offload``: the parts are in the CPU's memory until they are gathered.

    Raises:
        ModelError: it has no stack of layers, or quantised weights.
    """
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY  # its own, so not where other runs need it

    found = check_divisible(model, "fsdp")
    if device.type == "cpu":  # where layers are allocated and freed all the time
        give_back_freed()
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    whole = _whole(model, [layer for _, layers in found for layer in layers])
    for value in (*whole, *model.buffers()):  # not as a view of the file, of which the layers would stay in memory too
        value.data = value.data.to(device, copy=True)
    offload = CPUOffloadPolicy(pin_memory=device.type != "cpu") if cpu_offload else OffloadPolicy()
    for module, layers in reversed(found):  # a stack that another one's module holds comes first
        for each in (*layers, module):
            fully_shard(each, mesh=mesh, ignored_params=whole, offload_policy=offload)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            vars(part)["_is_fsdp_managed_module"] = True  # generates until the last process is ready
            # by its class, of which fully_shard has made another
            _CAN_RECORD_REGISTRY.update({str(type(part)): part._can_record_outputs})


def check_divisible(model: nn.Module, strategy: str) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Return the stacks of layers to divide.

    Raises:
        ModelError: the model has no stack, has quantised weights, or drops layers at random.
    """
    found = list(stacks(model))
    if not isinstance(model, PreTrainedModel) or not found:
        raise ModelError(f"{strategy} divides the layers of a stack, which this model does not have", key=_KEY)
    if any(is_quantised(module) for module in model.modules()):
        raise ModelError(f"{strategy} cannot divide quantised weights", key=_KEY)
    if any(getattr(model.config, name, 0) for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")):
        raise ModelError(f"{strategy} is not for models of which each process drops layers of its own", key=_KEY)
    return found


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
