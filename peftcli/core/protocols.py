"""What the layers module of a method defines: ``wrap``, and beyond it what this method needs. No torch here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from peftcli.core.config import AdapterConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftcli.core.layer import AdapterLayer

LAYERS: dict[str, str] = {}
"""PEFT's name of a method -> the module with its layers, imported on demand. ``peftcli.methods`` fills it."""
CONVERTERS: list[str] = []
"""Modules, imported on demand, that give what other writers' files hold core's names. ``peftcli.methods`` fills it."""


class Layers:
    """The functions of a method's layers module; of those that it does not define, the defaults below."""

    def __init__(self, module: ModuleType):
        vars(self).update(vars(module))

    def wrap(self, module: nn.Module, name: str, config: Any) -> AdapterLayer:
        """Return the adapter layer over ``module``, called ``name`` in the model; every method defines it.

        Raises:
            AdapterError: the method does not adapt this module.
        """
        raise NotImplementedError

    def reshape(self, model: nn.Module, config: Any) -> None:
        """Change the model's structure before targets are looked for. ``inject.on_unload`` registers the way back."""

    def after_merge(self, model: nn.Module, config: Any) -> None:
        """Complete what ``reshape`` did, once the adapter is merged and none of its layers is left."""

    def attach(self, model: nn.Module, config: Any, layers: Mapping[str, AdapterLayer]) -> None:
        """Complete a new adapter, whose ``layers`` are in place: draw what they share, add to the config for readers.

        ``layers`` has the names that ``targets`` gave.
        """

    def read_names(self, model: nn.Module, config: Any, names: Collection[str]) -> None:
        """Change a file's config to what the names of its tensors say, where PEFT finds modules by other rules."""

    def needs_batches(self, config: Any) -> bool:
        """Return whether ``calibrate`` is to be called."""
        return False

    def calibrate(self, model: nn.Module, config: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Start a new adapter from the training data, once, before the first step.

        ``batches`` are keyword arguments of the model's forward, labels included. They can be read more than once, and
        no gradient of them is kept.
        """

    def needs_base_weights(self, config: Any) -> bool:
        """Return whether ``start_from_base`` is to be called."""
        return False

    def start_from_base(self, model: nn.Module, config: Any, weight: Callable[[str], torch.Tensor]) -> None:
        """Start a new adapter. ``weight`` returns the tensor of that name in the model, before it was quantised."""

    def penalty(self, model: nn.Module, config: Any) -> torch.Tensor | None:
        """Return what is added in training to the mean loss over the global batch's targets: a scalar, or None."""
        return None

    def after_step(self, model: nn.Module, config: Any, step: int, total: int) -> None:
        """Act after optimizer step ``step``, counted from 1, of ``total``, while the gradients are still there."""

    def after_resume(self, model: nn.Module, config: Any, step: int, total: int) -> None:
        """Do again what ``after_step`` changes besides tensors: the config, or which weights train.

        The model holds a checkpoint that was written after step ``step`` of ``total``.
        """

    def model_attributes(self, model: nn.Module, configs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return attributes, by name, that the method's adapters, by name in ``configs``, give the adapted model."""
        return {}

    def describe(self, config: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return the object for the ``adapter_config.json`` of an adapter with these tensors."""
        described: dict[str, Any] = config.file_dict()
        return described


@runtime_checkable
class FindsTargets(Protocol):
    """Adapts other modules than ``target_modules`` alone names: those with the returned names, in the model's order.

    Raises AdapterError for a name in the config that matches nothing, and for a model that the method does not adapt.
    """

    def targets(self, model: nn.Module, config: Any) -> list[str]: ...


@runtime_checkable
class NamesAdapters(Protocol):
    """A config that names other adapters, and must be told how to find them."""

    adapters: dict[str, str] | None
    """Name -> folder or hub id."""
    find_folder: Callable[[str], Path]
    """Returns the folder of an adapter that is named by folder or hub id."""


def layers_of(config: AdapterConfig) -> Layers:
    """Import and return the layers module of the config's method."""
    return Layers(importlib.import_module(LAYERS[config.peft_type]))


def converters() -> list[Any]:
    """Import and return the modules that convert other writers' files; see ``peftcli.adapters.convert``."""
    return [importlib.import_module(name) for name in CONVERTERS]


def needs_batches(config: AdapterConfig) -> bool:
    """Return whether a new adapter starts from the training data: see ``Layers.calibrate``."""
    return layers_of(config).needs_batches(config)


def needs_base_weights(config: AdapterConfig) -> bool:
    """Return whether a new adapter starts from the weights before quantisation: see ``Layers.start_from_base``."""
    return layers_of(config).needs_base_weights(config)


def penalty(model: nn.Module, config: AdapterConfig) -> torch.Tensor | None:
    """Return what the method adds to the loss, or None."""
    return layers_of(config).penalty(model, config)


def after_step(model: nn.Module, config: AdapterConfig, step: int, total: int) -> None:
    """Let the method act after an optimizer step."""
    layers_of(config).after_step(model, config, step, total)


def describe(config: AdapterConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the object for the ``adapter_config.json`` of an adapter with these tensors."""
    return layers_of(config).describe(config, tensors)
