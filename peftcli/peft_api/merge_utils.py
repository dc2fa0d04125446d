"""PEFT's functions that merge tensors, over ``methods.combinations``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftcli.errors import AdapterError
from peftcli.methods.combinations import Combination, majority_mask

Tensors = Sequence[torch.Tensor]
Weights = torch.Tensor | Sequence[float]


def task_arithmetic(task_tensors: Tensors, weights: Weights) -> torch.Tensor:
    """Return the weighted sum."""
    return _merge(Combination("linear"), task_tensors, weights)


def magnitude_prune(task_tensors: Tensors, weights: Weights, density: float) -> torch.Tensor:
    """Return the weighted sum of what is left of each tensor without its smallest values."""
    return _merge(Combination("magnitude_prune", density=density), task_tensors, weights)


def ties(task_tensors: Tensors, weights: Weights, density: float, majority_sign_method: str = "total") -> torch.Tensor:
    """Return the mean of the weighted values whose sign has the majority, small ones left out."""
    how = Combination("ties", density=density, majority_sign=majority_sign_method)
    return _merge(how, task_tensors, weights)


def dare_linear(task_tensors: Tensors, weights: Weights, density: float) -> torch.Tensor:
    """Return the weighted sum of what is left of each tensor without values that are drawn, the others enlarged."""
    return _merge(Combination("dare_linear", density=density), task_tensors, weights)


def dare_ties(
    task_tensors: Tensors, weights: Weights, density: float, majority_sign_method: str = "total"
) -> torch.Tensor:
    """Return what ``ties`` does, with values dropped at random as in ``dare_linear``."""
    how = Combination("dare_ties", density=density, majority_sign=majority_sign_method)
    return _merge(how, task_tensors, weights)


def prune(tensor: torch.Tensor, density: float, method: str, rescale: bool = False) -> torch.Tensor:
    """Return a tensor with a share ``density`` of its values left, above 0 and at most 1.

    Of ``magnitude`` the largest are left, of ``random`` any; ``rescale`` enlarges these, so that the expectation stays.

    Raises:
        AdapterError: no method is called that, or the share is another number.
    """
    if method not in ("magnitude", "random"):
        raise AdapterError(f"must be magnitude or random, not {method!r}", key="method")
    how = Combination("magnitude_prune" if method == "magnitude" else "dare_linear", density=density)
    pruned = _merge(how, [tensor], [1.0])
    return pruned if method == "magnitude" or rescale else pruned * density


def calculate_majority_sign_mask(tensor: torch.Tensor, method: str = "total") -> torch.Tensor:
    """Return which of stacked values (n, ...) have the sign of the majority: see ``Combination.majority_sign``.

    Raises:
        AdapterError: no method is called that.
    """
    Combination("ties", density=1.0, majority_sign=method).check()
    return majority_mask(tensor, method)


def disjoint_merge(task_tensors: torch.Tensor, majority_sign_mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over the first dimension of the values that the mask names; 0 where it names none."""
    return (task_tensors * majority_sign_mask).sum(0) / majority_sign_mask.sum(0).clamp(min=1)


def _merge(how: Combination, tensors: Tensors, weights: Weights) -> torch.Tensor:
    how.check()
    return how.merged(torch.stack(list(tensors)), [float(weight) for weight in weights])
