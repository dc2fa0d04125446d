"""A ``forward`` that takes whatever the base model takes, and shows it: ``transformers.Trainer`` looks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch


class ShowsArguments:
    """Decorator of ``forward``: the model's has the arguments of the model inside, and so drops the same columns."""

    def __init__(self, function: Callable[..., Any]):
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, model: Any, kind: type) -> Callable[..., Any]:
        if model is None:
            return self.function
        if torch.compiler.is_compiling():  # nobody asks then, and a graph knows no subclass of partial
            return functools.partial(self.function, model)
        return _Bound(self.function, model)


class _Bound(functools.partial[Any]):
    """A method of a model."""

    @property
    def __func__(self) -> Callable[..., Any]:
        """The function, which Accelerate asks of a method."""
        return self.func

    @property
    def __signature__(self) -> inspect.Signature:
        shown = inspect.signature(self.args[0].get_base_model().forward)
        own = [*inspect.signature(self.func).parameters]

        def place(argument: inspect.Parameter) -> tuple[Any, ...]:
            order = own.index(argument.name) if argument.name in own else len(own)
            return argument.kind, argument.default is not argument.empty, order

        return shown.replace(parameters=sorted(shown.parameters.values(), key=place))


def forward_inside(model: Any) -> Callable[..., Any] | None:
    """The ``forward`` of the class of the model inside, of a model that shows its arguments; else None."""
    if not isinstance(inspect.getattr_static(type(model), "forward"), ShowsArguments):
        return None
    tuner = model.__dict__.get("_modules", {}).get("base_model")  # None in a model in the making
    return None if tuner is None else type(tuner.model).forward
