"""What state the adapter layers of a model are in, in PEFT's words: where they are, what trains, what is merged."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from peftcli.core.inject import num_replaced
from peftcli.core.layer import AdapterLayer, TrainedBias, TrainedCopy, adapter_layers, base_module, base_name
from peftcli.core.quantised import is_packed, is_quantised, num_weights
from peftcli.errors import AdapterError
from peftcli.methods._token_rows import TrainedRows
from peftcli.methods.lora.parameters import LoraParameter
from peftcli.peft_api.tuner import Tuner, find_tuner

Irregular = Literal["irregular"]
"""In the place of a value: it differs from layer to layer, or from tensor to tensor."""

_NAMES: dict[type[AdapterLayer], str] = {
    TrainedCopy: "ModulesToSaveWrapper",
    TrainedRows: "TrainableTokensLayer",
    LoraParameter: "lora.ParamWrapper",
}
"""PEFT's names of layers that it does not name by their method and the base model's class."""


@dataclass
class TunerLayerStatus:
    """The state of the adapters' layers over one module of the base model."""

    name: str
    """Path of the module, in the base model or below the ``PeftModel``'s ``base_model``."""
    module_type: str
    """Method and class of the module, for example ``lora.Linear``."""
    enabled: bool
    """Whether all layers of active adapters adapt it."""
    active_adapters: list[str]
    """Names of the active adapters of the model, whether or not they adapt this module."""
    merged_adapters: list[str]
    """Names of the adapters that are merged into its weights."""
    requires_grad: dict[str, bool | Irregular]
    """For each adapter of the module, whether its weights take gradients."""
    available_adapters: list[str]
    """Names of the adapters of the module."""
    devices: dict[str, list[str]]
    """For each adapter of the module, the kinds of device that its weights are on."""
    quantization_backend: str | None
    """What stores the module's weights in fewer bits, for example ``bnb 4bit``."""


@dataclass
class TunerModelStatus:
    """The state of the adapters of a model."""

    base_model_type: str
    """Class of the base model; ``other`` where that is neither in a ``PeftModel`` nor one of transformers."""
    adapter_model_type: str
    """PEFT's class for the method; ``None`` without a ``PeftModel``."""
    peft_types: dict[str, str]
    """PEFT's name of each adapter's method; empty without a ``PeftModel``."""
    trainable_params: int
    """Number of the parameters that train."""
    total_params: int
    """Number of all parameters, without the biases that trained ones replace."""
    num_adapter_layers: int
    """Number of the modules that adapters adapt."""
    enabled: bool | Irregular
    """Whether all layers of active adapters adapt the model."""
    active_adapters: list[str] | Irregular
    """Names of the active adapters."""
    merged_adapters: list[str] | Irregular
    """Names of the adapters that are merged."""
    requires_grad: dict[str, bool | Irregular]
    """For each adapter, whether its weights take gradients."""
    available_adapters: list[str]
    """Names of the adapters."""
    devices: dict[str, list[str]]
    """For each adapter, the kinds of device that its weights are on."""
    quantization_backend: str | None
    """What stores the adapted modules' weights in fewer bits."""


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Return the state of each adapted module of a model, or of the one in a ``PeftModel``, in the model's order.

    Raises:
        AdapterError: the model has no adapter.
    """
    tuner, place = _places(model)
    layers: dict[nn.Module, dict[str, AdapterLayer]] = {}
    for path, layer in adapter_layers(place).items():
        layers.setdefault(base_module(layer), {})[path] = layer
    active = list(dict.fromkeys(layer.adapter for layer in adapter_layers(place).values() if layer.enabled))
    off = not active
    if tuner is not None:
        active, off = list(tuner.active_adapters), tuner.disabled
    return [
        _layer_status(place, module, found, tuner, _active(found, tuner) or active, off)
        for module, found in layers.items()
        if any(type(layer) is not TrainedBias for layer in found.values())
    ]


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Return the state of the adapters of a model, or of the one in a ``PeftModel``, as a whole.

    Raises:
        AdapterError: it has none.
    """
    tuner, place = _places(model)
    layers = get_layer_status(model)
    configs = tuner.peft_config if tuner else {}
    known = getattr(sys.modules.get("transformers"), "PreTrainedModel", ())
    methods = {type(config).__name__.removesuffix("Config") + "Model" for config in configs.values()} or {"None"}
    names = list(dict.fromkeys(name for layer in layers for name in layer.available_adapters))
    return TunerModelStatus(
        base_model_type=type(place).__name__ if tuner or isinstance(place, known) else "other",
        adapter_model_type=methods.pop() if len(methods) == 1 else "MixedModel",
        peft_types={name: str(config.peft_type) for name, config in configs.items()},
        trainable_params=sum(value.numel() for value in place.parameters() if value.requires_grad),
        total_params=num_weights(place) - num_replaced(adapter_layers(place).values()),
        num_adapter_layers=len(layers),
        enabled=_common(layer.enabled for layer in layers),
        active_adapters=_common(layer.active_adapters for layer in layers),
        merged_adapters=sorted({name for layer in layers for name in layer.merged_adapters}),
        requires_grad={name: _common(_values(layers, "requires_grad", name)) for name in names},
        available_adapters=sorted(names),
        devices={
            name: sorted({kind for found in _values(layers, "devices", name) for kind in found}) for name in names
        },
        quantization_backend=_common(layer.quantization_backend for layer in layers),
    )


def _layer_status(
    model: nn.Module,
    module: nn.Module,
    layers: dict[str, AdapterLayer],
    tuner: Tuner | None,
    active: list[str],
    off: bool,
) -> TunerLayerStatus:
    merged = tuner.merged_adapters if tuner else []
    path, innermost = list(layers.items())[-1]
    names = sorted({layer.adapter for layer in layers.values()})
    of = {name: [layer for layer in layers.values() if layer.adapter == name] for name in names}
    trains = {name: [t.requires_grad for layer in of[name] for t in layer.own_tensors().values()] for name in names}
    tensors = {
        name: [t for layer in of[name] for t in {**layer.own_tensors(), **layer.fixed_tensors()}.values()]
        for name in names
    }
    expected = [layer for layer in layers.values() if layer.adapter in active]
    return TunerLayerStatus(
        name=("model." if tuner else "") + base_name(model, path),
        module_type=_module_type(innermost, module),
        enabled=not off and (bool(merged) or all(layer.enabled for layer in expected)),  # merging disables all
        active_adapters=active,
        merged_adapters=[name for name in merged if name in names],
        requires_grad={name: _common(values) for name, values in trains.items() if values},
        available_adapters=names,
        devices={name: sorted({value.device.type for value in values}) for name, values in tensors.items()},
        quantization_backend=_quantization_backend(module),
    )


def _active(layers: dict[str, AdapterLayer], tuner: Tuner | None) -> list[str]:
    """Return the active adapters as the layers on a module say; none while that is not known."""
    if tuner is None or tuner.disabled or tuner.folded:
        return []
    names = dict.fromkeys(name for layer in layers.values() for name in layer.active_adapters)
    return [name for name in names if name in tuner.peft_config]


def _places(model: Any) -> tuple[Tuner | None, nn.Module]:
    """Return the tuner, where there is one, and the model with the adapter layers."""
    tuner, place = find_tuner(model)
    if not adapter_layers(place):
        raise AdapterError("No adapter layers found in the model; use get_peft_model or inject first")
    return tuner, place


def _module_type(layer: AdapterLayer, module: nn.Module) -> str:
    method = type(layer).__module__.removeprefix("peftcli.methods.").partition(".")[0]
    name = next((name for kind, name in _NAMES.items() if isinstance(layer, kind)), None)
    return name or f"{method}.{type(module).__name__}"


def _quantization_backend(module: nn.Module) -> str | None:
    if not is_quantised(module):
        return None
    weight = type(module._parameters.get("weight")).__name__
    known = {"Params4bit": "bnb 4bit", "Int8Params": "bnb 8bit"}
    return known.get(weight) or (type(module).__name__ if is_packed(module) else "torchao")


def _values(layers: list[TunerLayerStatus], field: str, name: str) -> list[Any]:
    """Return the value of ``field`` for the adapter ``name`` at each module that has one."""
    return [getattr(layer, field)[name] for layer in layers if name in getattr(layer, field)]


def _common(values: Iterable[Any]) -> Any:
    """Return the value that all have, or ``irregular``."""
    found = list(values)
    return found[0] if all(value == found[0] for value in found) else "irregular"
