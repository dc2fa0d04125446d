"""What a model does, found by its outputs for two small batches that agree only then."""

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
