"""Take back intruder dimensions: strong directions of an adapted weight that the base weight does not have.

What was learnt through them makes the model forget most (https://arxiv.org/abs/2410.21228).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftcli.core.layer import base_module, widened
from peftcli.core.linear import dense_weight, linear_view
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
from peftcli.methods.lora.lora import LoraEmbedding, LoraLayer, lora_layers
from peftcli.methods.lora.updates import pairs


@dataclass(frozen=True)
class Intruders:
    """Which directions are intruders, and how much of them is taken back."""

    top_k: int = 10
    """How many of the strongest directions are looked at."""
    threshold: float = 0.5
    """A direction whose cosine with each of the base weight's is below this is an intruder."""
    kept: float = 0.75
    """The factor of their strength that stays. 1: nothing is taken back."""

    def removed(self, weight: torch.Tensor, update: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Return how many intruders the sum has, and the update with weaker ones: (out, in)."""
        base = torch.linalg.svd(weight, full_matrices=False).U
        u, values, v = torch.linalg.svd(weight + update, full_matrices=False)
        likeness = (u.T @ base).abs().amax(dim=1)[: self.top_k]
        found = (likeness < self.threshold).nonzero().flatten()
        return len(found), update - (1 - self.kept) * (u[:, found] * values[found]) @ v[found]


def without_intruders(
    model: nn.Module, adapter: str | None, intruders: Intruders, report: Callable[[str], Any]
) -> dict[str, torch.Tensor]:
    """Return the tensors of a LoRA adapter with weaker intruders. Layers that have none stay as they are.

    Raises:
        AdapterError: a layer is of a kind of its own.
    """
    tensors = adapter_state(model, adapter)
    names = pairs(tensors)
    for path, layer in lora_layers(model, adapter).items():
        if layer.lora_magnitude_vector is not None or path not in names:
            raise AdapterError(f"{path}: works for plain LoRA only", key="old_adapter_name")
        weight, update = _matrices(layer, path)
        count, changed = intruders.removed(weight, update)
        report(f"{path}: {count or 'no'} intruders")
        if count:
            a, b = tensors[names[path].a], tensors[names[path].b]
            u, values, v = torch.linalg.svd(changed / layer.scaling, full_matrices=False)
            root = values[: len(a)].sqrt()
            tensors[names[path].a] = (root.unsqueeze(1) * v[: len(a)]).view_as(a).to(a.dtype)
            tensors[names[path].b] = (u[:, : len(a)] * root).view_as(b).to(b.dtype)
    return tensors


@torch.no_grad()
def _matrices(layer: LoraLayer, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the base weight and the update of a layer as matrices (out, in)."""
    view, base = linear_view(layer), base_module(layer)
    if view is not None:
        return dense_weight(layer), view.as_stored(layer.delta()).to(dense_weight(layer))
    weight = widened(base.weight)
    if isinstance(layer, LoraEmbedding):
        return weight.T, layer.delta().T.to(weight)
    if getattr(base, "groups", 1) > 1:
        raise AdapterError(f"{path} is a convolution with groups", key="old_adapter_name")
    return weight.flatten(1), layer.delta().flatten(1).to(weight)
