"""The parts of a model: the stacks that hold most of its weights, and the heads of its task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from peftcli.core.heads import head_names
from peftcli.core.layer import base_module, base_modules, cast
from peftcli.core.quantised import is_quantised


def stacks(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Yield each module that holds a stack of layers, and the layers. A stack inside a layer is a part of the layer."""
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList) and len(child) > 1]
    if lists:
        yield module, [layer for each in lists for layer in _layers(each)]
    for child in module.children():
        if child not in lists:
            yield from stacks(child)


def _layers(found: nn.Module) -> Iterator[nn.Module]:
    for layer in found.children():  # a list of lists has nothing to call but what these hold
        yield from _layers(layer) if isinstance(layer, (nn.ModuleList, nn.ModuleDict)) else [layer]


def parameters_of_heads(model: Any) -> list[str]:
    """Return the names of the parameters of ``head_names``."""
    heads = tuple(f"{name}." for name in head_names(model))
    return [name for name, _ in model.named_parameters() if name.startswith(heads)]


def widen_heads(model: Any) -> None:
    """Let each head with an output for each label compute in float32, whatever the rest computes in.

    Of numbers near 2000, bfloat16 has every eighth. A quantised head stays as it is. An adapter's layers on a head
    compute so too: they must be in the model by then. A model without a head stays as it is.
    """
    if not any(hasattr(child, "base_model_prefix") for child in model.children()):
        return
    modules = base_modules(model)
    for name in head_names(model):
        parts = [module for path, module in modules.items() if f"{path}.".startswith(f"{name}.")]
        labelled = any(isinstance(part, nn.Linear) and part.out_features == model.config.num_labels for part in parts)
        if labelled and not any(map(is_quantised, parts)):
            head: Any = model.get_submodule(name)
            head.float()
            for each in {head, base_module(head)}:  # of which the latter stays where the adapter is taken out
                each.forward = functools.partial(_in_float32, each, each.forward)


def _in_float32(head: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(next(head.parameters()).device.type, enabled=False):
        given = {name: cast(value, torch.float32) for name, value in kwargs.items()}
        return forward(*cast(args, torch.float32), **given)
