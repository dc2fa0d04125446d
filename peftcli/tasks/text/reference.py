"""The model that a trained one is compared with: the base model, or the adapter as it began."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from peftcli.core.inject import disabled, evaluating
from peftcli.core.weights import named_tensors
from peftcli.errors import DataError
from peftcli.tasks.base import Batch, on_device

Kind = Literal["base", "start"]
_TOLERANCE = 0.01
"""Largest difference of logits that counts as none, as a share of their deviation."""


class Reference:
    """Changes a model into the reference for a while. All that it keeps is an adapter, where one is needed."""

    def __init__(self, kind: Kind | None):
        """Without a kind, ``begin`` finds it."""
        self.kind = kind
        self._start: dict[str, torch.Tensor] = {}

    def begin(self, model: nn.Module, probe: Batch, from_adapter: bool) -> None:
        """Look at the adapter that training begins with: a copy of it becomes the reference where it has an effect.

        ``from_adapter``: it was trained before, so it has one, however small. Of a new adapter, the outputs for
        ``probe`` show it.
        """
        if self.kind is None and from_adapter:
            self.kind = "start"
        elif self.kind is None:
            given = on_device(probe, next(model.parameters()).device)
            with torch.no_grad(), evaluating(model):
                own = model(**given).logits.float()
                with disabled(model):
                    base = model(**given).logits.float()
            largest = (own[:, -base.shape[1] :] - base).abs().max()
            self.kind = "base" if largest <= _TOLERANCE * base.std() else "start"
        if self.kind == "start":
            self._start = {name: each.detach().clone() for name, (_, _, each) in named_tensors(model).items()}

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model is the reference.

        Raises:
            DataError: the reference is an adapter that began elsewhere.
        """
        if self.kind != "start":
            with disabled(model):
                yield
            return
        tensors = named_tensors(getattr(model, "module", model))  # DDP is around it
        if self._start.keys() != tensors.keys():
            raise DataError(
                "the adapter was compared with itself as it began, which was not kept",
                key="task.reference",
                hint="If it began from another adapter, name that: training.init_adapter_from. Else only the run that "
                "trains it can measure it.",
            )
        now = {name: parameter.data for name, (_, _, parameter) in tensors.items()}
        for name, (_, _, parameter) in tensors.items():
            parameter.data = self._start[name]
        try:
            yield
        finally:
            for name, (_, _, parameter) in tensors.items():
                parameter.data = now[name]
