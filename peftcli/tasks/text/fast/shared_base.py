"""Models over the same weights, each with its own adapter, computed as one: base layers once for the tokens of all.

``sharing_copy`` makes such models. ``SharedBase`` sends one row of tokens through the base model; each adapter layer
gets the tokens of its own model, and the output that its base layer has computed for them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer, EmptyLayer, base_module, layers_at, outer_modules
from peftcli.errors import AdapterError


def sharing_copy(model: nn.Module) -> Any:
    """Return a copy of the model's modules, with the same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


class Randomness:
    """PyTorch's random numbers on a device as one of several models draws them."""

    def __init__(self, device: torch.device):
        self.device = device
        self.state = self.now()

    def now(self) -> tuple[torch.Tensor, ...]:
        """Return the states of the generators."""
        on_gpu = (torch.cuda.get_rng_state(self.device),) if self.device.type == "cuda" else ()
        return torch.get_rng_state(), *on_gpu

    def set(self, state: tuple[torch.Tensor, ...]) -> None:
        """Set the generators to states that ``now`` returned."""
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.cuda.set_rng_state(state[1], self.device)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, random numbers follow those that were drawn inside before; those outside are not touched."""
        outside = self.now()
        self.set(self.state)
        try:
            yield
        finally:
            self.state = self.now()
            self.set(outside)


@runtime_checkable
class Joins(Protocol):
    """An adapter layer that computes with those of other models on the same base layer, which saves copies."""

    def join_layers(self, x: torch.Tensor, layers: Sequence[tuple[AdapterLayer | None, int]]) -> torch.Tensor | None:
        """Return the output for ``x``, with gradients; None where each layer must do it by itself.

        ``layers`` are those of the models, with their numbers of tokens, which stand one after another in ``x``. None
        leaves the base layer's output as it is.
        """


@dataclass(frozen=True, eq=False)
class ModelOnBase:
    """One of the models that compute on a ``SharedBase``."""

    layers: dict[nn.Module, _Layer]
    """The joined base model's module -> the model's adapter layers on it."""
    random: Randomness


class SharedBase:
    """A base model that computes for several models over its weights at once."""

    def __init__(self, base: nn.Module):
        self.base = base
        self._sizes: list[tuple[ModelOnBase | None, int]] = []
        self._routed: set[nn.Module] = set()

    def add(self, model: nn.Module, random: Randomness) -> ModelOnBase:
        """Let a model with an adapter take part, which draws random numbers of its own.

        Raises:
            AdapterError: it is not the base model with an adapter.
        """
        layers, own = dict[nn.Module, _Layer](), dict(self.base.named_modules())
        for name, module in outer_modules(model).items():
            below, base = base_module(module), own.get(name)
            if base is None or any(
                base._parameters.get(leaf) is not value for leaf, value in below._parameters.items()
            ):
                raise AdapterError(f"changes the base model itself: {name}")
            if isinstance(module, AdapterLayer):
                if any(not layer.by_row for layer in module.modules() if isinstance(layer, AdapterLayer)):
                    raise AdapterError("changes more than the outputs of layers")
                layers[base] = _Layer(module)
                if base not in self._routed:
                    self._routed.add(base)
                    base.forward = functools.partial(self._forward, base, base.forward)
        return ModelOnBase(layers, random)

    @contextmanager
    def of(self, sizes: Sequence[tuple[ModelOnBase | None, int]]) -> Iterator[None]:
        """Inside, the base model gets the tokens of these models one after another, of each as many as given."""
        self._sizes = list(sizes)
        try:
            yield
        finally:
            self._sizes = []

    def _forward(self, base: nn.Module, forward: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the output of ``base`` for the tokens of all models, each adapted by its own."""
        sizes = [size for _, size in self._sizes]
        if x.shape[:2] == (1, sum(sizes)):
            axis = 1
        elif x.shape[0] == sum(sizes):
            axis = 0
        else:
            raise AdapterError(f"a {type(base).__name__} that is adapted does not get all tokens")
        layers = [
            (model.layers[base].outer if model and base in model.layers else None, size) for model, size in self._sizes
        ]
        first = next((layer for layer, _ in layers if layer is not None), None)
        if isinstance(first, Joins) and torch.is_grad_enabled() and not args and not kwargs:
            joined = first.join_layers(x, layers)
            if joined is not None:
                return joined
        parts = list(forward(x, *args, **kwargs).split(sizes, axis))
        for at, ((model, _), own) in enumerate(zip(self._sizes, x.split(sizes, axis), strict=True)):
            if model is not None and base in model.layers:
                with model.random():
                    parts[at] = model.layers[base](own, parts[at], args, kwargs)
        return torch.cat(parts, axis)


class _Layer:
    """The adapter layers of one model on one module, called with what that module gives."""

    def __init__(self, outer: AdapterLayer):
        inner = layers_at(outer)[-1]
        self.outer, self.inner, self.base = outer, inner, inner.base_layer
        self.known_output = _KnownOutput(inner.base_layer)

    def __call__(self, x: torch.Tensor, y: torch.Tensor, args: Any, kwargs: Any) -> Any:
        """Return the output for ``x``, where ``y`` is the base layer's."""
        self.known_output.known = x, y
        self.inner._modules["base_layer"] = self.known_output
        try:
            return self.outer(x, *args, **kwargs)
        finally:
            self.inner._modules["base_layer"] = self.base
            self.known_output.known = None


class _KnownOutput(EmptyLayer):
    """A base layer whose output for one input is known already."""

    known: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.weights = tuple(base_layer._parameters.values())

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # a layer may call it with other inputs, or put other weights in for the call
        weights = zip(self.base_layer._parameters.values(), self.weights, strict=True)
        if self.known is not None and x is self.known[0] and all(now is before for now, before in weights):
            return self.known[1]
        return self.base_layer(x, *args, **kwargs)
