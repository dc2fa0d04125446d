"""CorDA: Context-Oriented Decomposition Adaptation (https://arxiv.org/abs/2406.05223)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from peftcli.errors import AdapterError
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.initialisations import CordaConfig
from peftcli.methods.lora.initialisations.start import (
    Batches,
    Pair,
    balanced,
    check_directions,
    check_reached,
    first_batches,
    inputs_recorded,
)

_EXAMPLES = 256
"""As many as the paper takes."""


def corda(weight: torch.Tensor, covariance: torch.Tensor, r: int, scaling: float, config: LoraConfig) -> Pair:
    """Return singular vectors of ``W C``, with the covariance ``C: (in, in)`` of the layer's inputs.

    ``ipm`` takes the r largest, ``kpm`` the r smallest.
    """
    check_directions(weight, r)
    method = (config.corda_config or CordaConfig()).corda_method
    covariance, inverse = _inverted(covariance.to(weight.dtype))
    u, s, vh = torch.linalg.svd(weight @ covariance, full_matrices=False)
    kept = slice(0, r) if method == "ipm" else slice(len(s) - r, len(s))
    return balanced(u[:, kept], s[kept] / scaling, (vh @ inverse)[kept])


def covariances_of(model: nn.Module, modules: Mapping[str, nn.Module], batches: Batches) -> dict[str, torch.Tensor]:
    """Return ``covariances`` over the first of these batches."""

    def forward() -> None:
        for batch in first_batches(batches, _EXAMPLES):
            model(**batch)

    return covariances(model, modules, forward)


def covariances(model: nn.Module, modules: Mapping[str, nn.Module], run: Callable[[], None]) -> dict[str, torch.Tensor]:
    """Return the mean over examples of ``X^T X: (in, in)`` of each module's inputs while ``run`` uses the model.

    Padding does not count. As in the paper, an example's inputs are divided by the largest of them.

    Raises:
        AdapterError: a module has no inputs, or they are not finite.
    """
    sums: dict[str, torch.Tensor] = {}
    examples = dict.fromkeys(modules, 0)

    def record(name: str, rows: list[torch.Tensor]) -> None:
        for x in rows:
            x = x.float() / x.max().abs()
            product = x.T @ x
            sums[name] = sums[name] + product if name in sums else product
            examples[name] += 1

    with inputs_recorded(model, modules, record, label=None), torch.no_grad():
        run()
    check_reached(modules, sums)
    if bad := next((name for name, value in sums.items() if not torch.isfinite(value).all()), None):
        raise AdapterError(f"the inputs of {bad} are not finite", key="init_lora_weights")
    return {name: value / examples[name] for name, value in sums.items()}


def _inverted(covariance: torch.Tensor) -> Pair:
    """Return the covariance with as much added to its diagonal as a good inverse takes, and that inverse."""
    damp, one = 0.01, torch.eye(len(covariance), device=covariance.device, dtype=covariance.dtype)
    while True:
        firm = covariance + damp * covariance.diagonal().mean() * one
        inverse = torch.linalg.inv(firm)
        if torch.dist(firm @ inverse, one) < 0.05:
            return firm, inverse
        damp *= 2
