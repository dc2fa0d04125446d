"""Load a model whose adapter is merged in memory before it answers: it computes no update beside its weights then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.inject import is_reshaped
from peftcli.core.layer import adapter_layers, base_module
from peftcli.core.merge import merge_layer_by_layer
from peftcli.core.quantised import is_quantised
from peftcli.errors import AdapterError
from peftcli.tasks.base import scores_of

_TOLERANCE = 1e-4
"""Largest difference of logits in float32, root mean square relative to their spread. Seen were 2e-6."""


class Loaded(Protocol):
    """What answers with a model."""

    @property
    def model(self) -> Any:
        """The model with the adapter."""
        ...


T = TypeVar("T", bound=Loaded)


def load_merged(
    load: Callable[[], T], config: AdapterConfig, answer: Callable[[T], object], tell: Callable[[str], None]
) -> T:
    """Load a model and merge its adapter, if it can be merged and the first answers stay what they are.

    ``load`` is called once more if merging has turned out inexact. ``answer`` answers the first batch with what it has
    returned, and is left after one forward pass. ``tell`` is told whether the adapter is merged, and why not.
    """
    loaded = load()
    if problem := _problem(loaded.model, config):
        tell(f"not merged in memory: {problem}")
        return loaded
    expected = _scores(loaded, answer)
    try:
        merge_layer_by_layer(loaded.model)
        found = _scores(loaded, answer)
        spread = float(expected.std(correction=0) or expected.abs().mean()) or 1.0  # a single score has a size only
        off = float((found - expected).square().mean().sqrt()) / spread
        problem = (
            "" if off <= _TOLERANCE else f"the logits of the first batch would differ by {off:.2g} of their spread"
        )
    except AdapterError as error:
        problem = error.message
    if problem:
        tell(f"not merged in memory: {problem}")
        del loaded
        return load()
    tell(f"merged in memory: the logits of the first batch differ by {off:.2g} of their spread")
    return loaded


def _problem(model: nn.Module, config: AdapterConfig) -> str | None:
    """Return why an adapter cannot be merged into the model in memory, or None."""
    if reason := config.merge_problem():
        return reason
    adapted = [base_module(layer) for layer in adapter_layers(model).values()]
    if any(map(is_quantised, adapted)):
        return "the base model is quantised"
    if any(weight.dtype != torch.float32 for base in adapted for weight in base.parameters()):
        return "in half precision a small update would be lost in the weights"
    return "layers of the model share their weights" if is_reshaped(model) else None


class _FirstPassDone(Exception):
    """Ends an answer after its first forward pass."""


def _scores(loaded: T, answer: Callable[[T], object]) -> torch.Tensor:
    """The scores of the first forward pass of an answer."""
    found: list[torch.Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(scores_of(output).float().cpu())
        raise _FirstPassDone

    hook = loaded.model.register_forward_hook(keep)
    try:
        answer(loaded)
    except _FirstPassDone:
        pass
    finally:
        hook.remove()
    return found[0]
