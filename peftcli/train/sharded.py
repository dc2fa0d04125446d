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
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from peftcli.core.layer import adapter_layers, base_module
from peftcli.core.quantised import is_quantised
from peftcli.errors import ModelError
from peftcli.models.stacks import stacks

_KEY = "launch.strategy"


def shard(model: nn.Module, device: torch.device) -> None:
    """Divide the layers of a model among all processes, in place. An adapter in it stays whole.

    Raises:
        ModelError: it has no stack of layers, or quantised weights.
    """
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY  # its own, so not where other runs need it

    found = list(stacks(model))
    if not isinstance(model, PreTrainedModel) or not found:
        raise ModelError("fsdp divides the layers of a stack, which this model does not have", key=_KEY)
    if any(is_quantised(module) for module in model.modules()):
        raise ModelError("fsdp cannot divide quantised weights", key=_KEY)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    whole = _whole(model, [layer for _, layers in found for layer in layers])
    for parameter in whole:  # not as a view of the file, of which the layers would stay in memory too
        parameter.data = parameter.data.clone()
    for module, layers in reversed(found):  # a stack that another one's module holds comes first
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params=whole)
        fully_shard(module, mesh=mesh, ignored_params=whole)
    for each in model.modules():
        if isinstance(each, PreTrainedModel):
            vars(each)["_is_fsdp_managed_module"] = True  # generates until the last process is ready
            # by its class, of which fully_shard has made another
            _CAN_RECORD_REGISTRY.update({str(type(each)): each._can_record_outputs})


def is_sharded(model: nn.Module) -> bool:
    """Whether a model is divided."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def _whole(model: nn.Module, layers: list[nn.Module]) -> set[nn.Parameter]:
    """The parameters outside the layers, those that train, and those that adapters have of their own."""
    divided = {parameter for layer in layers for parameter in layer.parameters() if not parameter.requires_grad}
    for layer in adapter_layers(model).values():
        divided -= set(layer.parameters()) - set(base_module(layer).parameters())
    return set(model.parameters()) - divided
