"""A different adapter for each row of a batch.

While ``adapted_by_row`` lasts, an adapter layer gives the rows of its adapter to itself and the others to what stands
below it, which routes them on. Outside nothing of this is on the way.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer, MixedRows, adapter_layers
from peftcli.core.targets import model_type
from peftcli.errors import AdapterError
from peftcli.methods._families import TIME_FIRST

BASE = "__base__"
"""In the place of an adapter's name: none."""


@contextmanager
def adapted_by_row(model: nn.Module, names: Sequence[str], copies: int = 1) -> Iterator[None]:
    """Inside, row i of every batch is adapted by the adapter called ``names[i]``, whichever are active.

    Args:
        model: the model, with adapters in it, in evaluation mode.
        names: one a row; ``__base__`` where no adapter is wanted.
        copies: how many rows ``generate`` may make of each, for beams or samples; they stand side by side.

    Raises:
        AdapterError: an unknown name, or an adapter whose effect cannot be told apart by rows. Inside: a layer whose
            input's first dimension is not the batch.
    """
    wanted = set(names) - {BASE}
    layers = adapter_layers(model)
    _check(model, names, layers)
    routing = _Routing(list(names), copies)
    before = [(layer, layer.enabled, vars(layer).get("forward")) for layer in layers.values()]
    for path, layer in layers.items():
        layer.enabled, layer.serves = layer.adapter in wanted, MixedRows() if len(set(names)) > 1 else None
        vars(layer)["forward"] = functools.partial(routing.forward, path, layer, layer.forward)
    try:
        yield
        for path, layer in layers.items():
            if layer.serves and layer.serves.read and path not in routing.called:
                message = f"the model reads the {layer.serves.read} of {path} without calling it"
                hint = f"{layer.adapter} can only be used for whole batches"
                raise AdapterError(message, key="adapter_names", hint=hint)
    finally:
        for layer, enabled, forward in before:
            layer.enabled, layer.serves = enabled, None
            del vars(layer)["forward"]
            if forward is not None:
                vars(layer)["forward"] = forward


def check_count(model: nn.Module, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse another number of names than there are rows, as far as the inputs of the model show how many there are."""
    main = (getattr(model, "main_input_name", "input_ids"), "inputs", "input_ids", "inputs_embeds")
    first = [*args[:1], *(kwargs[key] for key in main if key in kwargs)] or list(kwargs.values())
    rows = {value.shape[0] for value in first if isinstance(value, torch.Tensor) and value.ndim}
    if rows and len(names) not in rows:
        raise AdapterError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {min(rows)}"
        )


@dataclass
class _Routing:
    names: list[str]
    """Whose the rows of the batch are, or of the part of it that is on its way through a layer."""
    copies: int
    places: list[int] | None = None
    """Which rows of the batch those are; None: all."""
    called: set[str] = field(default_factory=set)
    """Paths of the layers that the model has called."""

    def forward(self, path: str, layer: AdapterLayer, forward: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what ``layer`` computes of its adapter's rows, and what is below it of the others, in their order."""
        self.called.add(path)
        rows = self.names if len(set(self.names)) == 1 else self._rows_of(path, x)
        own = [name == layer.adapter for name in rows]
        if all(own):
            with with_attributes(layer.serves, numbers=self.places) if layer.serves else nullcontext():
                return forward(x, *args, **kwargs)
        if not any(own):
            return layer.base_layer(x, *args, **kwargs)
        if any(not isinstance(value, (bool, int, float, str, type(None))) for value in [*args, *kwargs.values()]):
            raise AdapterError(f"{path} takes more than one input, so its rows cannot go to different adapters")
        parts, places = [], []
        for compute, chosen in ((forward, True), (layer.base_layer, False)):
            index = [i for i, mine in enumerate(own) if mine is chosen]
            inside = index if self.places is None else [self.places[i] for i in index]
            with (
                with_attributes(self, names=[rows[i] for i in index], copies=1, places=inside),
                with_attributes(layer.serves, numbers=inside),
            ):
                parts.append(compute(x[index], *args, **kwargs))
            places += index
        order = torch.tensor(places, device=x.device).argsort()
        return _join(parts, order, path)

    def _rows_of(self, path: str, x: Any) -> list[str]:
        """The adapter of each row of ``x``."""
        count = x.shape[0] if isinstance(x, torch.Tensor) and x.ndim else None
        if count == len(self.names):
            return self.names
        if self.copies > 1 and count == len(self.names) * self.copies:
            return [name for name in self.names for _ in range(self.copies)]
        found = "no tensor" if count is None else f"of the shape {tuple(x.shape)}"
        raise AdapterError(
            f"{path} gets an input {found}, which is no batch of {len(self.names)} rows; "
            "one adapter at a time works here: set_adapter"
        )


@contextmanager
def with_attributes(thing: Any, **values: Any) -> Iterator[None]:
    """Inside, the attributes of ``thing`` with these names have these values."""
    before = {name: getattr(thing, name) for name in values}
    try:
        for name, value in values.items():
            setattr(thing, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(thing, name, value)


def _check(model: nn.Module, names: Sequence[str], layers: dict[str, AdapterLayer]) -> None:
    """Refuse what cannot be told apart by rows; a batch that is all one adapter's needs not be."""
    wanted = set(names) - {BASE}
    known = {layer.adapter for layer in layers.values()}
    if unknown := sorted(wanted - known):
        there = ", ".join(sorted(known)) or "none"
        raise AdapterError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; there are: {there}")
    if len(set(names)) == 1:
        return
    if model_type(model) in TIME_FIRST:
        raise AdapterError(f"{type(model).__name__} does not keep rows apart", key="adapter_names")
    for path, layer in layers.items():
        if layer.adapter in wanted and not layer.by_row:
            raise AdapterError(
                f"{layer.adapter} changes more than the outputs of layers; it can only be used for whole batches",
                key="adapter_names",
            )
        if layer.adapter in wanted and "experts" in path.split("."):
            raise AdapterError(
                f"{path} sees the tokens of all rows that are routed to it; {layer.adapter} can only be used for "
                "whole batches",
                key="adapter_names",
            )


def _join(parts: list[Any], order: torch.Tensor, path: str) -> Any:
    """The outputs for two parts of the rows as one, with row i where ``order[i]`` says."""
    if all(isinstance(part, torch.Tensor) for part in parts):
        return torch.cat(parts)[order]
    if all(part is None for part in parts):
        return None
    if all(isinstance(part, tuple) and len(part) == len(parts[0]) for part in parts):
        return tuple(_join(list(each), order, path) for each in zip(*parts, strict=True))
    raise AdapterError(f"{path} gives a {type(parts[0]).__name__}, whose rows cannot come from different adapters")
