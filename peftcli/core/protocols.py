"""What the layers module of a method defines: ``wrap``, and beyond it what this method needs.

Each of the other functions is a protocol here, and ``isinstance(layers_of(config), Calibrates)`` asks for it. Of those
that the package calls in several places, the functions below give the default. No torch here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from peftcli.core.config import AdapterConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftcli.core.layer import AdapterLayer

LAYERS: dict[str, str] = {}
"""PEFT's name of a method -> the module with its layers, imported on demand. ``peftcli.methods`` fills it."""


class Layers(Protocol):
    """A method's layers module."""

    def wrap(self, module: nn.Module, name: str, config: Any) -> AdapterLayer:
        """Return the adapter layer over ``module``, whose name in the model is ``name``.

        Raises:
            AdapterError: the method does not adapt such a module.
        """


@runtime_checkable
class FindsTargets(Protocol):
    """A method that adapts other modules than ``target_modules`` alone names."""

    def targets(self, model: nn.Module, config: Any) -> list[str]:
        """Return the names of the modules that ``wrap`` adapts, in the model's order.

        Raises:
            AdapterError: a name that the config gives matches nothing.
        """


@runtime_checkable
class Reshapes(Protocol):
    """A method that changes the base model's structure."""

    def reshape(self, model: nn.Module, config: Any) -> None:
        """Change the structure before targets are looked for. ``core.inject.on_unload`` registers the way back."""

    def after_merge(self, model: nn.Module, config: Any) -> None:
        """Finish the structure once the adapter is merged and none of its layers is left."""


@runtime_checkable
class Attaches(Protocol):
    """A method that needs something on the model as a whole."""

    def attach(self, model: nn.Module, config: Any, layers: Mapping[str, AdapterLayer]) -> None:
        """Complete the new adapter, whose ``layers`` are in place under the names that ``targets`` gave.

        A place to draw what all layers share, and to write into the config what the file's readers need.
        """


@runtime_checkable
class Calibrates(Protocol):
    """A method that can start from what the training data says."""

    def needs_batches(self, config: Any) -> bool:
        """Return whether ``calibrate`` is to be called."""

    def calibrate(self, model: nn.Module, config: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Start a new adapter from the training data, once, before the first step.

        ``batches`` are keyword arguments of the model's forward, labels included. They can be read more than once, and
        no gradient of them is kept.
        """


@runtime_checkable
class StartsFromBase(Protocol):
    """A method that can start from the base model's weights as they were before they were quantised."""

    def needs_base_weights(self, config: Any) -> bool:
        """Return whether ``start_from_base`` is to be called."""

    def start_from_base(self, model: nn.Module, config: Any, weight: Callable[[str], torch.Tensor]) -> None:
        """Start a new adapter. ``weight`` returns the tensor of that name in the model, before it was quantised."""


@runtime_checkable
class Penalizes(Protocol):
    """A method that adds to the loss."""

    def penalty(self, model: nn.Module, config: Any) -> torch.Tensor | None:
        """Return what training adds to the mean loss over the global batch's targets: a scalar with gradients."""


@runtime_checkable
class AfterStep(Protocol):
    """A method that acts between optimizer steps."""

    def after_step(self, model: nn.Module, config: Any, step: int, total: int) -> None:
        """Act after optimizer step ``step``, counted from 1, of ``total``, while the gradients are still there."""


@runtime_checkable
class AfterResume(Protocol):
    """A method whose ``after_step`` changes more than tensors: the config, or which weights train."""

    def after_resume(self, model: nn.Module, config: Any, step: int, total: int) -> None:
        """Do it again, once the model holds a checkpoint that was written after step ``step`` of ``total``."""


@runtime_checkable
class Describes(Protocol):
    """A method whose ``adapter_config.json`` depends on the adapter's tensors."""

    def describe(self, config: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return what ``file_dict`` returns for an adapter with these tensors."""


def layers_of(config: AdapterConfig) -> Layers:
    """Import and return the layers module of the config's method."""
    layers: Any = importlib.import_module(LAYERS[config.peft_type])
    return layers


def wrap(module: nn.Module, name: str, config: AdapterConfig) -> AdapterLayer:
    """Return the adapter layer of the config's method over ``module``."""
    return layers_of(config).wrap(module, name, config)


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
