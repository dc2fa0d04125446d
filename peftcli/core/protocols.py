"""What the layers module of a method, and its config, define: ``wrap``, and beyond it what this method needs.

Each protocol says what a module does that has its function, and ``isinstance(layers_of(config), AfterStep)`` asks for
it. Of those that are called in several places, the functions below give the default. No torch here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from peftcli.core.config import AdapterConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftcli.core.layer import AdapterLayer

LAYERS: dict[str, str] = {}
"""PEFT's name of a method -> the module with its layers, imported on demand. ``peftcli.methods`` fills it."""


class Layers(Protocol):
    """A method's layers module. ``wrap`` returns the adapter layer over ``module``, called ``name`` in the model.

    It raises AdapterError for a module that the method does not adapt.
    """

    def wrap(self, module: nn.Module, name: str, config: Any) -> AdapterLayer: ...


@runtime_checkable
class NamesAdapters(Protocol):
    """A config that names other adapters, and must be told how to find them."""

    adapters: dict[str, str] | None
    """Name -> folder or hub id."""
    find_folder: Callable[[str], Path]
    """Returns the folder of an adapter that is named by folder or hub id."""


@runtime_checkable
class FindsTargets(Protocol):
    """Adapts other modules than ``target_modules`` alone names: those with the returned names, in the model's order.

    Raises AdapterError for a name in the config that matches nothing, and for a model that the method does not adapt.
    """

    def targets(self, model: nn.Module, config: Any) -> list[str]: ...


@runtime_checkable
class Reshapes(Protocol):
    """Changes the base model's structure."""

    def reshape(self, model: nn.Module, config: Any) -> None:
        """Change it before targets are looked for. ``core.inject.on_unload`` registers the way back."""

    def after_merge(self, model: nn.Module, config: Any) -> None:
        """Finish it once the adapter is merged and none of its layers is left."""


@runtime_checkable
class Attaches(Protocol):
    """Completes the new adapter, whose ``layers`` are in place under the names that ``targets`` gave.

    The place to draw what all layers share, and to write into the config what the file's readers need.
    """

    def attach(self, model: nn.Module, config: Any, layers: Mapping[str, AdapterLayer]) -> None: ...


@runtime_checkable
class ReadsFiles(Protocol):
    """Changes a file's config to what the names of its tensors say, where PEFT finds modules by other rules."""

    def read_names(self, model: nn.Module, config: Any, names: Collection[str]) -> None: ...


@runtime_checkable
class Calibrates(Protocol):
    """Can start from what the training data says."""

    def needs_batches(self, config: Any) -> bool:
        """Return whether ``calibrate`` is to be called."""

    def calibrate(self, model: nn.Module, config: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Start a new adapter from the training data, once, before the first step.

        ``batches`` are keyword arguments of the model's forward, labels included. They can be read more than once, and
        no gradient of them is kept.
        """


@runtime_checkable
class StartsFromBase(Protocol):
    """Can start from the base model's weights as they were before they were quantised."""

    def needs_base_weights(self, config: Any) -> bool:
        """Return whether ``start_from_base`` is to be called."""

    def start_from_base(self, model: nn.Module, config: Any, weight: Callable[[str], torch.Tensor]) -> None:
        """Start a new adapter. ``weight`` returns the tensor of that name in the model, before it was quantised."""


@runtime_checkable
class Penalizes(Protocol):
    """Adds to the mean loss over the global batch's targets, in training: a scalar with gradients, or None."""

    def penalty(self, model: nn.Module, config: Any) -> torch.Tensor | None: ...


@runtime_checkable
class AfterStep(Protocol):
    """Acts after optimizer step ``step``, counted from 1, of ``total``, while the gradients are still there."""

    def after_step(self, model: nn.Module, config: Any, step: int, total: int) -> None: ...


@runtime_checkable
class AfterResume(Protocol):
    """Its ``after_step`` changes more than tensors, the config or which weights train, and this does it again.

    Called once the model holds a checkpoint that was written after step ``step`` of ``total``.
    """

    def after_resume(self, model: nn.Module, config: Any, step: int, total: int) -> None: ...


@runtime_checkable
class ExtendsModel(Protocol):
    """Gives a model with its adapters more attributes than every adapted model has: name -> value.

    ``configs`` are those of the method's adapters, by name.
    """

    def model_attributes(self, model: nn.Module, configs: Mapping[str, Any]) -> Mapping[str, Any]: ...


@runtime_checkable
class Describes(Protocol):
    """Writes an ``adapter_config.json`` that depends on the adapter's tensors: returns what ``file_dict`` does."""

    def describe(self, config: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]: ...


def layers_of(config: AdapterConfig) -> Layers:
    """Import and return the layers module of the config's method."""
    return importlib.import_module(LAYERS[config.peft_type])


def needs_batches(config: AdapterConfig) -> bool:
    """Return whether a new adapter starts from the training data: see ``calibrate``."""
    layers = layers_of(config)
    return isinstance(layers, Calibrates) and layers.needs_batches(config)


def needs_base_weights(config: AdapterConfig) -> bool:
    """Return whether a new adapter starts from the weights before quantisation: see ``start_from_base``."""
    layers = layers_of(config)
    return isinstance(layers, StartsFromBase) and layers.needs_base_weights(config)


def penalty(model: nn.Module, config: AdapterConfig) -> torch.Tensor | None:
    """Return what the method adds to the loss, or None."""
    layers = layers_of(config)
    return layers.penalty(model, config) if isinstance(layers, Penalizes) else None


def after_step(model: nn.Module, config: AdapterConfig, step: int, total: int) -> None:
    """Let the method act after an optimizer step."""
    layers = layers_of(config)
    if isinstance(layers, AfterStep):
        layers.after_step(model, config, step, total)


def describe(config: AdapterConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the object for the ``adapter_config.json`` of an adapter with these tensors."""
    layers = layers_of(config)
    return layers.describe(config, tensors) if isinstance(layers, Describes) else config.file_dict()
