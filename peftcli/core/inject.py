"""Put an adapter's layers into a model, switch them off, take them out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.layer import AdapterLayer, TrainedCopy, adapter_layers
from peftcli.core.targets import find_modules
from peftcli.errors import AdapterError


@dataclass(frozen=True)
class Injection:
    """What ``inject`` did."""

    layers: dict[str, AdapterLayer]
    """Path in the model -> adapter layer."""
    trainable: int
    """Parameters of the adapter."""
    total: int
    """Parameters of the model, the adapter's included."""


def inject(model: nn.Module, config: AdapterConfig) -> Injection:
    """Freeze the model and put the config's adapter layers into it, in place.

    Nothing is changed when this raises.

    Raises:
        AdapterError: the config names modules that the model lacks or that the method cannot adapt, or the model
            holds an adapter already.
    """
    config.check()
    if adapter_layers(model):
        raise AdapterError("the model already holds an adapter; merge or unload that first")
    saved = find_modules(model, config.modules_to_save or (), "modules_to_save")
    inside = tuple(f"{name}." for name in saved)  # trained in full already
    names = [name for name in config.targets(model) if not f"{name}.".startswith(inside)]
    if not names:
        raise AdapterError("modules_to_save leaves no module to adapt", key="target_modules")
    layers = {name: config.wrap(model.get_submodule(name), name) for name in names}
    layers |= {name: TrainedCopy(model.get_submodule(name), config.file_prefix) for name in saved}
    total_before = _count(model.parameters())
    model.requires_grad_(False)
    for name, layer in layers.items():
        replace_module(model, name, layer.train(layer.base_layer.training))
    config.attach(model)
    layers = adapter_layers(model)
    trainable = sum(_count(layer.own_tensors().values()) for layer in layers.values())
    return Injection(layers, trainable, total_before + trainable)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what the base model computes."""
    layers = list(adapter_layers(model).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def set_trainable(model: nn.Module, trainable: bool) -> None:
    """Let the adapter's weights take gradients, or not. The base model stays frozen."""
    for layer in adapter_layers(model).values():
        for parameter in layer.own_tensors().values():
            parameter.requires_grad_(trainable)


def unload(model: nn.Module) -> None:
    """Take every adapter layer out again; the base layers stand where they stood."""
    for name, layer in adapter_layers(model).items():
        base: nn.Module = layer
        while isinstance(base, AdapterLayer):
            base = base.base_layer
        if name in dict(model.named_modules()):  # a nested layer left with the one around it
            replace_module(model, name, base)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` where the module called ``name`` stands, at every place that shares it."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for attribute, child in list(parent.named_children()):
            if child is old:
                setattr(parent, attribute, new)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
