"""The adapter's tensors out of a model and into it, by the names of the adapter file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer, adapter_layers
from peftcli.errors import AdapterError

_MOST_SHOWN = 8
_PEFT_COPY = re.compile(r"\.(modules_to_save|original_module)(?=\.bias$)")
"""With bias: all, PEFT writes the biases of saved modules under these names too, beside the true ones."""


def named_tensors(model: nn.Module) -> dict[str, tuple[AdapterLayer, str, nn.Parameter]]:
    """Name in the adapter file -> the layer, the tensor's name in it, the parameter."""
    return {
        layer.file_name(path, tensor): (layer, tensor, parameter)
        for path, layer in adapter_layers(model).items()
        for tensor, parameter in layer.own_tensors().items()
    }


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors by the names of the adapter file, detached."""
    return {name: parameter.detach() for name, (_, _, parameter) in named_tensors(model).items()}


def load_state(model: nn.Module, tensors: Mapping[str, torch.Tensor], file: str | None = None) -> None:
    """Copy the tensors of an adapter file into the model's adapter layers.

    A file may also hold the base weights of adapted embeddings and heads, as PEFT writes them when the vocabulary
    was resized; they replace the model's.

    Raises:
        AdapterError: a missing, unexpected, misshapen or non-finite tensor; all of them in one message. Nothing is
            changed then.
    """
    values = check_state(model, tensors, file)
    targets = {name: parameter for name, (_, _, parameter) in named_tensors(model).items()}
    targets |= _adapted_base_weights(model)
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)


def check_state(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], file: str | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter file in the shapes that the model's adapter layers hold.

    Raises:
        AdapterError: a missing, unexpected, misshapen or non-finite tensor; all of them in one message.
    """
    wanted = named_tensors(model)
    base = _adapted_base_weights(model)
    values = {
        name: wanted[name][0].accepts(wanted[name][1], value) for name, value in tensors.items() if name in wanted
    }
    wrong = [f"missing: {name}" for name in wanted if name not in tensors]
    wrong += [f"unexpected: {name}" for name in tensors if _PEFT_COPY.sub("", name) not in wanted and name not in base]
    shapes = {name: parameter.shape for name, (_, _, parameter) in wanted.items()}
    shapes |= {name: parameter.shape for name, parameter in base.items()}
    values |= {name: value for name, value in tensors.items() if name in base}
    for name, value in values.items():
        if value.shape != shapes[name]:
            wrong.append(f"shape: {name} is {tuple(value.shape)}, the model needs {tuple(shapes[name])}")
        elif not value.is_floating_point():
            wrong.append(f"type: {name} is {str(value.dtype).removeprefix('torch.')}, no floating-point numbers")
        elif not torch.isfinite(value.float()).all():
            wrong.append(f"not finite: {name}")
    if wrong:
        shown = wrong[:_MOST_SHOWN] + ([f"and {len(wrong) - _MOST_SHOWN} more"] if len(wrong) > _MOST_SHOWN else [])
        raise AdapterError("the adapter does not fit this base model:\n  " + "\n  ".join(shown), file=file)
    return values


def _adapted_base_weights(model: Any) -> dict[str, nn.Parameter]:
    """The base weights that an adapter file may carry: name in the file -> parameter."""
    ends = {
        id(getter())
        for name in ("get_input_embeddings", "get_output_embeddings")
        if (getter := getattr(model, name, None))
    }
    return {
        layer.file_name(path, "base_layer.weight"): layer.base_layer.weight
        for path, layer in adapter_layers(model).items()
        if id(layer) in ends and isinstance(getattr(layer.base_layer, "weight", None), nn.Parameter)
    }
