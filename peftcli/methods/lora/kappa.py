"""KappaTune: adapt the weights with the smallest condition numbers (https://arxiv.org/abs/2506.16289).

A weight that treats all directions alike loses less of what it knows when it is changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from peftcli.core.linear import dense_weight, linear_view

EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
"""Endings of the names of weights that hold an expert in each row: (experts, ., .)."""


def condition_numbers_of_layers(model: nn.Module, largest: int) -> dict[str, float]:
    """Return the condition number of each linear layer without a side above ``largest``, by name."""
    found = {}
    for name, module in model.named_modules():
        view = linear_view(module)
        if view is not None and max(view.in_features, view.out_features) <= largest:
            found[name] = float(_condition_number(dense_weight(module)))
    return found


def condition_numbers_of_experts(model: nn.Module, largest: int, endings: Sequence[str] = EXPERTS) -> dict[str, float]:
    """Return the mean condition number of the experts in each fused weight, by the parameter's name."""
    return {
        name: float(_condition_number(value.detach().float()).mean())
        for name, value in model.named_parameters()
        if name.endswith(tuple(endings)) and value.ndim == 3 and max(value.shape[1:]) <= largest
    }


def _condition_number(weight: torch.Tensor) -> torch.Tensor:
    values = torch.linalg.svdvals(weight)
    return values[..., 0] / (values[..., -1] + 1e-8)
