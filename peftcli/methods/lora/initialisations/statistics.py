"""Record the inputs of a model's layers while it reads training data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftcli.core.inject import evaluating
from peftcli.errors import AdapterError

Batches = Iterable[Mapping[str, torch.Tensor]]
PADDED = -100
"""The label of a position that a decoder does not read."""


def first_batches(batches: Batches, examples: int) -> Iterator[Mapping[str, torch.Tensor]]:
    """Return the first batches that hold ``examples`` together."""
    for batch in batches:
        if examples <= 0:
            return
        examples -= len(next(iter(batch.values())))
        yield batch


@contextmanager
def inputs_recorded(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    record: Callable[[str, list[torch.Tensor]], None],
    label: int | None,
) -> Iterator[None]:
    """Inside, ``record`` gets each module's name and inputs (n, in), example by example, without padding.

    Positions whose label is ``label`` are left out too, unless it is None.
    """
    masks: list[torch.Tensor] = []

    def look(_model: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        masks[:] = _masks(model, kwargs, label)

    def hook(name: str) -> Callable[[nn.Module, Any], None]:
        def watch(_module: nn.Module, args: Any) -> None:
            rows = _rows(args[0].detach(), reversed(masks) if "decoder" in name.split(".") else masks)
            if rows:
                record(name, rows)

        return watch

    handles = [model.register_forward_pre_hook(look, with_kwargs=True)]
    handles += [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        with evaluating(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _masks(model: Any, inputs: Mapping[str, Any], label: int | None) -> list[torch.Tensor]:
    """Return which positions (B, T) count, of what the model reads; and of what its decoder reads, if it has one."""
    padding, labels = inputs.get("attention_mask"), inputs.get("labels")
    labels = labels if labels is not None and labels.ndim == 2 else None
    found = [padding.bool()] if padding is not None and padding.ndim == 2 else []
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return found if labels is None else [*found, labels != (PADDED if label is None else label)]
    if label is None or labels is None:
        return found
    return [mask & (labels != label) if mask.shape == labels.shape else mask for mask in found] or [labels != label]


def _rows(x: torch.Tensor, masks: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return inputs (B, T, in) as (n, in) for each example that has any; (n, in) as they are."""
    if x.ndim == 2:
        return [x] if len(x) else []
    mask = next((mask for mask in masks if mask.shape == x.shape[:-1]), None)
    rows = x.flatten(1, -2) if mask is None else [example[keep] for example, keep in zip(x, mask, strict=True)]
    return [row for row in rows if len(row)]


def check_reached(modules: Iterable[str], found: Mapping[str, Any]) -> None:
    """Raise AdapterError for a module that the data did not reach."""
    if missing := next((name for name in modules if name not in found), None):
        raise AdapterError(f"the data do not reach {missing}; leave it out of target_modules", key="init_lora_weights")
