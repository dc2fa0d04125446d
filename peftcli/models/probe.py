"""What a model does, found by its outputs for two small batches that agree only then; and its stacks of layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from peftcli.core.inject import evaluating


@contextmanager
def probing(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the model computes in evaluation mode; then its modules' modes and the random state are as before."""
    with torch.no_grad(), evaluating(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def deviation(found: torch.Tensor, expected: torch.Tensor, outputs: torch.Tensor | None = None) -> float:
    """Return how far the outputs (..., H) of any position are off, as a root mean square relative to their spread.

    ``outputs`` have the spread, by default the expected ones.
    """
    spread = (expected if outputs is None else outputs).std()
    return float((found - expected).square().mean(dim=-1).sqrt().max() / spread)


def agrees(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Return whether outputs deviate by the tolerance at most; those with NaN do not agree."""
    return deviation(found, expected) <= tolerance


def stacks(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Yield each module that holds a stack of layers, and the layers. A stack inside a layer is a part of the layer."""
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList) and len(child) > 1]
    if lists:
        yield module, [layer for each in lists for layer in _layers(each)]
    for child in module.children():
        if child not in lists:
            yield from stacks(child)


def _layers(found: nn.Module) -> Iterator[nn.Module]:
    for layer in found.children():  # a list of lists has nothing to call but what these hold
        yield from _layers(layer) if isinstance(layer, (nn.ModuleList, nn.ModuleDict)) else [layer]
