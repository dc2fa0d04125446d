"""The adapter's tensors out of a model and into it, by the names of the adapter file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peftcli.core.inject import replace_weight
from peftcli.core.layer import (
    AdapterLayer,
    TrainedCopy,
    adapter_layers,
    base_module,
    base_modules,
    model_ends,
    offloaded_to_run_on,
    path_in_file,
)
from peftcli.core.protocols import converters
from peftcli.errors import AdapterError
from peftcli.guard.files import first_of, short_name


def named_tensors(model: nn.Module, adapter: str | None = None) -> dict[str, tuple[AdapterLayer, str, nn.Parameter]]:
    """Return the tensors that train, of one adapter or of all: name -> layer, the tensor's name in it, parameter.

    A tensor that layers share has one entry.
    """
    found: dict[nn.Parameter, tuple[str, AdapterLayer, str]] = {}
    for path, layer in _paths_in_file(model, adapter).items():
        for tensor, parameter in layer.own_tensors().items():
            found.setdefault(parameter, (layer.file_name(path, tensor), layer, tensor))
    return {name: (layer, tensor, parameter) for parameter, (name, layer, tensor) in found.items()}


def adapter_state(model: nn.Module, adapter: str | None = None) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors by the names of the adapter file, detached."""
    copies = {
        f"{layer.file_prefix}{path}.{tensor}": getattr(layer, tensor).detach()
        for path, layer in _paths_in_file(model, adapter).items()
        for tensor in layer.copies
    }
    return {name: value.detach() for name, (_, _, value) in file_tensors(model, adapter).items()} | copies


def training_state(model: nn.Module, adapter: str | None = None) -> dict[str, torch.Tensor]:
    """Return what resuming needs of the adapter: the tensors that train, and those drawn at the start. Detached."""
    return {
        layer.file_name(path, tensor): value.detach()
        for path, layer in _paths_in_file(model, adapter).items()
        for tensor, value in {**layer.own_tensors(), **layer.fixed_tensors()}.items()
    }


def unsaved_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the part of ``training_state`` that the adapter file does not hold as it is."""
    file = {name: value.data_ptr() for name, value in adapter_state(model).items()}
    return {name: value for name, value in training_state(model).items() if file.get(name) != value.data_ptr()}


def load_training_state(model: nn.Module, tensors: Mapping[str, torch.Tensor], adapter: str | None = None) -> None:
    """Copy ``training_state`` back into the model: the adapter file's tensors with ``unsaved_state`` over them.

    Raises:
        AdapterError: a tensor is missing or of another shape.
    """
    now = training_state(model, adapter)
    wrong = [name for name in now if name not in tensors or tensors[name].shape != now[name].shape]
    if wrong:
        raise AdapterError(f"the training state does not fit this model: {', '.join(first_of(wrong))}")
    for name, value in now.items():
        value.copy_(tensors[name])


def holds_its_file(model: nn.Module, adapter: str | None = None) -> bool:
    """Return whether the model holds the adapter file's tensors as they are, so that ``load_state`` can fill them."""
    state = {value.data_ptr() for value in training_state(model, adapter).values()}
    held = {name: layer.parts(tensor, value) for name, (layer, tensor, value) in file_tensors(model, adapter).items()}
    parts = (part for name, value in adapter_state(model, adapter).items() for part in held.get(name, [value]))
    return all(part.data_ptr() in state for part in parts)


def file_tensors(model: nn.Module, adapter: str | None = None) -> dict[str, tuple[AdapterLayer, str, torch.Tensor]]:
    """Return the file's tensors: name -> layer, the tensor's name in it, tensor. A shared tensor has one entry."""
    return {
        layer.file_name(path, tensor): (layer, tensor, value)
        for path, layer in _paths_in_file(model, adapter).items()
        for tensor, value in layer.file_tensors().items()
    }


def load_state(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], file: str | None = None, adapter: str | None = None
) -> None:
    """Copy the tensors of an adapter file into the model's adapter layers, in their dtypes.

    Weights on the meta device get memory, on the device of the layer that they adapt. A file may also hold the base
    weights of embedding and head, as PEFT writes them when they are adapted or the vocabulary was resized; they
    replace the model's until its adapters are unloaded.

    Raises:
        AdapterError: a missing, unexpected, misshapen or non-finite tensor; all of them in one message. Nothing is
            changed then.
    """
    if not holds_its_file(model, adapter):
        raise AdapterError("what this adapter trains is not what its file holds; load the file into another model")
    values = check_state(model, tensors, file, adapter)
    own, base = file_tensors(model, adapter), base_weights(model, adapter)
    with torch.no_grad():
        for name, value in values.items():
            if name in own:
                layer, tensor, place = own[name]
                _fill(layer.parts(tensor, place), value, layer)
            elif not base[name].is_meta and not torch.equal(base[name], new := value.to(base[name])):
                replace_weight(model, base[name], new)


def check_state(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], file: str | None = None, adapter: str | None = None
) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter file in the shapes of the model's adapter layers.

    Raises:
        AdapterError: a missing, unexpected, misshapen or non-finite tensor; all of them in one message.
    """
    paths = _paths_in_file(model, adapter)
    for converter in converters():
        tensors = converter.convert_tensors(model, paths, tensors, file_tensors(model, adapter))
    for path, layer in paths.items():
        names = {tensor: layer.file_name(path, tensor) for tensor in layer.file_tensors()}
        layer.before_loading({tensor: tensors[name] for tensor, name in names.items() if name in tensors})
    wanted = file_tensors(model, adapter)
    base = {name: value for name, value in base_weights(model, adapter).items() if name not in wanted}
    values = {
        name: wanted[name][0].adapt_from_file(wanted[name][1], tensors[name]) for name in tensors if name in wanted
    }
    values |= {name: tensors[name] for name in tensors if name in base}
    missing = {
        name: isinstance(layer, TrainedCopy) and own in layer.fixed_tensors()
        for name, (layer, own, _) in wanted.items()
        if name not in tensors and own not in layer.optional
    }
    if kept := [name for name, is_buffer in missing.items() if is_buffer]:
        warnings.warn(f"the adapter was saved without {kept[0]}, which stays as in the base model", stacklevel=2)
    wrong = [f"missing: {name}" for name, is_buffer in missing.items() if not is_buffer]
    wrong += [f"unexpected: {short_name(name)}" for name in tensors if name not in values]
    for name, value in values.items():
        place = base[name] if name in base else wanted[name][2]
        if value.shape != place.shape:
            wrong.append(f"shape: {name} is {tuple(value.shape)}, the model needs {tuple(place.shape)}")
        elif value.is_floating_point() != place.is_floating_point():
            needed = "whole" if value.is_floating_point() else "floating-point"
            wrong.append(f"type: {name} is {str(value.dtype).removeprefix('torch.')}, no {needed} numbers")
        elif not value.is_meta and not is_finite(value, place.dtype):
            wrong.append(f"not finite: {name}")
    if wrong:
        raise AdapterError(_listed("the adapter does not fit this base model", wrong), file=file)
    return values


def check_finite(tensors: Mapping[str, torch.Tensor], file: str | None = None) -> None:
    """Raise AdapterError with the names of tensors that contain NaN or Inf.

    The model's output does not show it: attention hides NaN from the logits.
    """
    if wrong := [f"not finite: {short_name(name)}" for name, value in tensors.items() if not is_finite(value)]:
        raise AdapterError(_listed("contains NaN or Inf", wrong), file=file)


def is_finite(value: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return whether the tensor contains no NaN or Inf, nor would in another dtype.

    It is read once, and no memory is taken.
    """
    if value.is_complex():
        value = torch.view_as_real(value)
    if not value.is_floating_point() or not value.numel():
        return True
    if value.dtype.itemsize == 1:  # of float8, PyTorch knows no order
        value = value.float()
    ends = torch.stack(tuple(torch.aminmax(value)))  # NaN is both the least and the largest
    return bool(torch.isfinite(ends.to(dtype or ends.dtype)).all())


def _fill(targets: list[torch.Tensor], value: torch.Tensor, layer: AdapterLayer) -> None:
    """Copy ``value``, or its rows, into tensors of ``layer``, which get memory if they are on the meta device."""
    values = [value] if len(targets) == 1 else value.split([len(target) for target in targets])
    for target, own in zip(targets, values, strict=True):
        if not target.is_meta:
            target.copy_(own)
            continue
        base = base_module(layer)
        devices = [each.device for each in (*base.parameters(), *base.buffers()) if not each.is_meta]
        device = offloaded_to_run_on(base) or (devices[0] if devices else own.device)
        filled = own.detach().to(device, target.dtype, copy=True)
        new = nn.Parameter(filled, target.requires_grad) if isinstance(target, nn.Parameter) else filled
        torch.utils.swap_tensors(target, new)


def _listed(what: str, wrong: list[str]) -> str:
    """Return the message ``what`` with the first problems, each on its own line."""
    return "\n  ".join([f"{what}:", *first_of(wrong)])


def _paths_in_file(model: nn.Module, adapter: str | None) -> dict[str, AdapterLayer]:
    layers = adapter_layers(model, adapter)
    names = sorted({layer.adapter for layer in layers.values()})
    if len(names) > 1:
        raise AdapterError(f"the model holds several adapters, {', '.join(names)}; name one")
    return {path_in_file(model, path): layer for path, layer in layers.items()}


def base_weights(model: Any, adapter: str | None = None, prefix: str | None = None) -> dict[str, nn.Parameter]:
    """Return the weights of the base model's embedding and head that an adapter file may carry, by their names in it.

    PEFT writes them when they are adapted, or when the vocabulary was resized. Without the ``prefix`` of the names they
    are returned under either that there is.
    """
    prefixes = ("base_model.model.", "base_model.") if prefix is None else (prefix,)
    layers = adapter_layers(model, adapter)
    names = {id(module): name for name, module in base_modules(model).items()}
    found: dict[str, nn.Parameter] = {}
    for end in (base_module(end) for end in model_ends(model) if end is not None):
        if id(end) not in names:  # in a module that trains in full
            continue
        over = {path: layer for path, layer in layers.items() if base_module(layer) is end}
        for leaf, value in end._parameters.items():
            if value is None or not value.is_floating_point():
                continue
            written = [layer.file_name(path_in_file(model, path), f"base_layer.{leaf}") for path, layer in over.items()]
            found |= dict.fromkeys(written or [f"{start}{names[id(end)]}.{leaf}" for start in prefixes], value)
    return found
