"""Fold an adapter into its base model."""

from __future__ import annotations

import torch
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.inject import replace_module
from peftcli.core.layer import AdapterLayer
from peftcli.errors import AdapterError


def merge(model: nn.Module, config: AdapterConfig) -> bool:
    """Fold the model's adapter into its weights, in place; no adapter layer is left.

    Sums are made in float32 whatever the base dtype. An adapted embedding or head that shares its weight with the
    other one gets a weight of its own.

    Returns:
        Whether input and output embeddings shared a weight before and do not now.

    Raises:
        AdapterError: the method cannot be merged, or a merged weight is not finite.
    """
    if reason := config.merge_problem():
        raise AdapterError(reason)
    tied = _tied(model)
    for name, layer in outermost(model).items():
        merged = layer.merge()
        for leaf, value in merged.named_parameters():
            if not torch.isfinite(value).all():
                raise AdapterError(f"{name}.{leaf} is not finite after merging")
        replace_module(model, name, merged)
    return tied and not _tied(model)


def outermost(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter layers that stand in no other adapter layer: path -> layer."""
    found: dict[str, AdapterLayer] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{path}.") for path in found)
        if isinstance(module, AdapterLayer) and not inside:
            found[name] = module
    return found


def _tied(model: nn.Module) -> bool:
    ends = [
        getter() for name in ("get_input_embeddings", "get_output_embeddings") if (getter := getattr(model, name, None))
    ]
    weights = [getattr(end, "weight", None) for end in ends]
    return len(weights) == 2 and weights[0] is not None and weights[0] is weights[1]
