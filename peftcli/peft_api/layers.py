"""PEFT's names of adapter layers: their classes, what can be done with one of them, and what state they are in."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from peftcli.core.config import extend
from peftcli.core.inject import num_replaced
from peftcli.core.layer import (
    AdapterLayer,
    EmptyLayer,
    TrainedBias,
    TrainedCopy,
    adapter_dtype,
    adapter_layers,
    base_module,
    base_name,
    layers_at,
    plain_dtype,
)
from peftcli.core.merge import MergedWeights, merge_in_place
from peftcli.core.quantised import FLOATS, is_packed, is_quantised, num_weights
from peftcli.core.weights import file_tensors
from peftcli.errors import AdapterError
from peftcli.peft_api.tuner import Tuner, find_tuner

BaseTunerLayer = AdapterLayer
ModulesToSaveWrapper = TrainedCopy

Irregular = Literal["irregular"]
"""In the place of a value: it differs from layer to layer, or from tensor to tensor."""


class LayerMethods:
    """PEFT's attributes and methods of an ``AdapterLayer``, which libraries call on each layer of a model."""

    full_scaling: float | None = None
    """Of a layer whose update is multiplied by ``scaling``: what that is at first."""
    merged_weights: MergedWeights | None = None
    """Of the innermost layer on a module: what the layers on it changed that were merged one by one."""
    peft_name: str | None = None
    """PEFT's name of a layer that it does not name by its method and the base model's class."""

    @property
    def active_adapter(self: Any) -> list[str]:
        """Names of the model's active adapters. PEFT's layers, unlike its models, give a list of a single one too."""
        return list(self.active_adapters)

    @property
    def merged(self: Any) -> bool:
        """Whether the layer's adapter is merged into the base weights."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self: Any) -> bool:
        """Whether the layer's adapter is active and switched off."""
        return self.adapter in self.active_adapters and not self.enabled and not self.merged_adapters

    def set_adapter(self: Any, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Enable the layer if its adapter is one of these, and let its weights train; else the reverse.

        With ``inference_mode`` they are frozen in any case.

        Raises:
            AdapterError: the layer would override that of another of these adapters.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check_active(names)
        self.active_adapters = names
        self.enabled = self.adapter in names and not self.merged_adapters
        for parameter in self.own_tensors().values():
            parameter.requires_grad_(self.enabled and not inference_mode)

    def enable_adapters(self: Any, enabled: bool) -> None:
        """Disable the layer, or enable it again if its adapter is an active one. One that is merged is unmerged."""
        if not enabled:
            self.unmerge()
        self.enabled = enabled and self.adapter in self.active_adapters and not self.merged_adapters

    def set_scale(self: Any, adapter: str, scale: float) -> None:
        """Use this share of the update if ``adapter`` is the layer's."""
        if adapter == self.adapter and self.full_scaling is not None:
            self.scaling = scale * self.full_scaling

    def scale_layer(self: Any, scale: float) -> None:
        """Multiply the share of the update that is used, if the layer is enabled."""
        if self.enabled and self.full_scaling is not None:
            self.scaling *= scale

    def unscale_layer(self: Any, scale: float | None = None) -> None:
        """Divide that share, or use the whole update again; if the layer is enabled."""
        if self.enabled and self.full_scaling is not None:
            self.scaling = self.full_scaling if scale is None else self.scaling / scale

    def get_base_layer(self: Any) -> Any:
        """Return the base model's module."""
        return layers_at(self)[-1].base_layer

    def merge(self: Any, safe_merge: bool = True, adapter_names: Sequence[str] | None = None) -> None:
        """Put the layer's update into the base weights, until ``unmerge``, if its adapter is one of these, or active.

        Merged weights are checked to be finite, whatever ``safe_merge`` is.

        Raises:
            AdapterError: the layer cannot be merged, or a merged weight is not finite. Nothing is changed then.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        if self.adapter in names and not self.merged_adapters:
            innermost = layers_at(self)[-1]
            _merge_only(innermost, [*_merged_at(innermost), self])

    def unmerge(self: Any) -> None:
        """Take back ``merge``, exactly; what else is merged on the module stays so.

        Raises:
            AdapterError: the layer was merged with the whole model, or beside an adapter that was deleted since.
        """
        innermost = layers_at(self)[-1]
        if self in _merged_at(innermost):
            _merge_only(innermost, [layer for layer in _merged_at(innermost) if layer is not self])
        elif self.merged_adapters:
            raise AdapterError(f"{self.adapter} was not merged by this layer alone", hint="call unmerge_adapter()")

    def delete_adapter(self: Any, adapter_name: str) -> None:
        """Become an empty layer if that is the layer's adapter; one that is merged stays in the base weights.

        If it was the only active one, the first adapter that is left on the module becomes active. The empty layer goes
        when the next adapter comes.
        """
        stack = layers_at(self)
        left = [name for name in self.active_adapters if name != adapter_name]
        others = [layer.adapter for layer in stack if layer.adapter not in ("", adapter_name)]
        if self.adapter == adapter_name:
            if self.merged_adapters:
                _note_merged(stack[-1], None)
            _empty(self)
            self.active_adapters = left or others[-1:]
        elif left:
            self.active_adapters = left
        elif self.active_adapters:
            self.set_adapter(others[-1:])

    def adapter_state_dict_load_map(self: Any, adapter_name: str) -> dict[str, str]:
        """Return where transformers' ``load_adapter`` puts tensors: name below the layer, in the file -> in the model.

        Raises:
            AdapterError: a tensor of the file belongs to several layers, or the layer does not hold it as it is.
        """
        if adapter_name != self.adapter:
            return {}
        held = {id(value): name for name, value in [*self.named_parameters(), *self.named_buffers()]}
        start, places = f"{self.file_prefix}layer.", {}
        for tensor, value in self.file_tensors().items():
            name, place = self.file_name("layer", tensor), held.get(id(value))
            if not name.startswith(start) or place is None:
                message = f"load_adapter of transformers cannot read {tensor}"
                raise AdapterError(message, hint="use PeftModel.from_pretrained")
            places[name.removeprefix(start)] = place
        return {name: place for name, place in places.items() if name != place}


class CopyMethods:
    """PEFT's attributes of a module of modules_to_save."""

    peft_name = "ModulesToSaveWrapper"

    @property
    def original_module(self: Any) -> Any:
        """The base model's module."""
        return self.get_base_layer()

    @property
    def modules_to_save(self: Any) -> nn.ModuleDict:
        """The copies of the module: adapter -> its copy."""
        layers: list[Any] = layers_at(self)
        return nn.ModuleDict({layer.adapter: layer.copy for layer in layers if isinstance(layer, TrainedCopy)})


extend(AdapterLayer, LayerMethods)
extend(TrainedCopy, CopyMethods)


def cast_weights(model: nn.Module, adapter: str, *, as_base: bool = False) -> None:
    """Hold the adapter's weights in float32 or wider, or in the dtypes of the layers that they adapt."""
    for layer in adapter_layers(model, adapter).values():
        found = [value.dtype for value in base_module(layer).parameters() if value.dtype in FLOATS]
        base = found[0] if found else plain_dtype(model)
        for value in {**layer.own_tensors(), **layer.fixed_tensors()}.values():
            if value.is_floating_point():
                value.data = value.data.to(base if as_base else adapter_dtype(value))


def empty_state(model: nn.Module, adapter: str) -> None:
    """Move the tensors that the adapter's file holds to the meta device, to be filled by ``load_state``."""
    files = file_tensors(model, adapter).values()
    for value in [part for layer, tensor, whole in files for part in layer.parts(tensor, whole)]:
        empty = torch.empty_like(value, device="meta")
        torch.utils.swap_tensors(
            value, nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
        )


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
    """Those of the model, whether or not they adapt this module."""
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
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
    total_params: int
    """Number of all parameters, without the biases that trained ones replace."""
    num_adapter_layers: int
    """Number of the modules that adapters adapt."""
    enabled: bool | Irregular
    """Whether all layers of active adapters adapt the model."""
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Return the state of each adapted module of a model, or of the one in a ``PeftModel``, in the model's order.

    Raises:
        AdapterError: the model has no adapter.
    """
    tuner, place = find_tuner(model)
    layers = adapter_layers(place)
    if not layers:
        raise AdapterError("No adapter layers found in the model; use get_peft_model or inject first")
    stacks: dict[nn.Module, dict[str, AdapterLayer]] = {}
    for path, layer in layers.items():
        stacks.setdefault(base_module(layer), {})[path] = layer
    enabled = list(dict.fromkeys(layer.adapter for layer in layers.values() if layer.enabled))
    return [
        _layer_status(place, module, stack, tuner, enabled)
        for module, stack in stacks.items()
        if any(type(layer) is not TrainedBias for layer in stack.values())
    ]


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Return the state of the adapters of a model, or of the one in a ``PeftModel``, as a whole.

    Raises:
        AdapterError: it has none.
    """
    layers, (tuner, place) = get_layer_status(model), find_tuner(model)
    configs = tuner.peft_config if tuner else {}
    known = getattr(sys.modules.get("transformers"), "PreTrainedModel", ())
    methods = {type(config).__name__.removesuffix("Config") + "Model" for config in configs.values()} or {"None"}
    names = list(dict.fromkeys(name for layer in layers for name in layer.available_adapters))
    trainable, total = count_parameters(place)
    return TunerModelStatus(
        base_model_type=type(place).__name__ if tuner or isinstance(place, known) else "other",
        adapter_model_type=methods.pop() if len(methods) == 1 else "MixedModel",
        peft_types={name: str(config.peft_type) for name, config in configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common(layer.enabled for layer in layers),
        active_adapters=_common(layer.active_adapters for layer in layers),
        merged_adapters=sorted({name for layer in layers for name in layer.merged_adapters}),
        requires_grad={
            name: _common(layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
            for name in names
        },
        available_adapters=sorted(names),
        devices={name: sorted({kind for layer in layers for kind in layer.devices.get(name, ())}) for name in names},
        quantization_backend=_common(layer.quantization_backend for layer in layers),
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of parameters that train, and of all, without the biases that trained ones replace."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained, num_weights(model) - num_replaced(adapter_layers(model).values())


def _layer_status(
    model: nn.Module, module: nn.Module, stack: dict[str, AdapterLayer], tuner: Tuner | None, enabled: list[str]
) -> TunerLayerStatus:
    """Return the state of the layers ``stack``, by path, over ``module``; ``enabled`` are the model's adapters."""
    active, off, merged = enabled, not enabled, list[str]()
    if tuner is not None:
        active, off, merged = list(tuner.active_adapters), tuner.disabled, tuner.merged_adapters
        if not (tuner.disabled or tuner.folded):  # the layers may have been switched one by one
            switched = dict.fromkeys(name for layer in stack.values() for name in layer.active_adapters)
            active = [name for name in switched if name in tuner.peft_config] or active
    trains: dict[str, list[bool]] = {}
    devices: dict[str, set[str]] = {}
    for layer in stack.values():
        own = layer.own_tensors().values()
        trains.setdefault(layer.adapter, []).extend(value.requires_grad for value in own)
        kinds = {value.device.type for value in (*own, *layer.fixed_tensors().values())}
        devices[layer.adapter] = devices.get(layer.adapter, set()) | kinds
    path, innermost = list(stack.items())[-1]
    method = type(innermost).__module__.removeprefix("peftcli.methods.").partition(".")[0]
    expected = [layer for layer in stack.values() if layer.adapter in active]
    return TunerLayerStatus(
        name=("model." if tuner else "") + base_name(model, path),
        module_type=innermost.peft_name or f"{method}.{type(module).__name__}",
        enabled=not off and (bool(merged) or all(layer.enabled for layer in expected)),  # merging disables all
        active_adapters=active,
        merged_adapters=[name for name in merged if name in trains],
        requires_grad={name: _common(values) for name, values in sorted(trains.items()) if values},
        available_adapters=sorted(trains),
        devices={name: sorted(kinds) for name, kinds in sorted(devices.items())},
        quantization_backend=_quantization_backend(module),
    )


def _quantization_backend(module: nn.Module) -> str | None:
    if not is_quantised(module):
        return None
    weight = type(module._parameters.get("weight")).__name__
    known = {"Params4bit": "bnb 4bit", "Int8Params": "bnb 8bit"}
    return known.get(weight) or (type(module).__name__ if is_packed(module) else "torchao")


def _common(values: Iterable[Any]) -> Any:
    """Return the value that all have, or ``irregular``."""
    found = list(values)
    return found[0] if all(value == found[0] for value in found) else "irregular"


def _empty(layer: AdapterLayer) -> None:
    """Make the layer an empty one, without an adapter."""
    base, merged = layer.base_layer, layer.merged_weights
    layer.__dict__.clear()
    layer.__class__ = EmptyLayer
    layer.__init__(base)  # type: ignore[misc]
    _note_merged(layer, merged)


def _merged_at(innermost: Any) -> list[Any]:
    return [] if innermost.merged_weights is None else list(innermost.merged_weights.layers)


def _note_merged(innermost: Any, merged: MergedWeights | None) -> None:
    innermost.merged_weights, innermost.stays = merged, merged is not None


def _merge_only(innermost: Any, layers: list[Any]) -> None:
    """Merge these layers into the weights of the module that ``innermost`` is on, and no others."""
    before = _merged_at(innermost)
    if before:
        innermost.merged_weights.undo()
    _note_merged(innermost, None)
    if layers:
        top = max(layers, key=lambda layer: len(layers_at(layer)))
        enabled = {layer: layer.enabled for layer in top.modules() if isinstance(layer, AdapterLayer)}
        for layer in enabled:
            layer.enabled = layer in layers
        try:
            _note_merged(innermost, merge_in_place(top))
        except AdapterError:
            for layer, was in enabled.items():
                layer.enabled = was
            _merge_only(innermost, before)
            raise
        for layer in enabled.keys() - {*layers}:
            layer.enabled = enabled[layer]
    for layer in before:
        layer.enabled = layer not in layers and layer.adapter in layer.active_adapters
