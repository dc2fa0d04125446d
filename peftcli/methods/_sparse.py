"""The base of methods that train single numbers of a matrix."""

from __future__ import annotations

import torch

from peftcli.core.linear import Linear
from peftcli.errors import AdapterError
from peftcli.methods._linear import DeltaLinear, stored_weight


def drawn_places(layer: DeltaLinear, name: str, key: str, count: int, seed: int | None) -> torch.Tensor:
    """Random places in an (out, in) matrix, as indices into its flat form: (count,).

    They are drawn as PEFT draws them: its files may hold the seed alone. On the CPU when the model is on the meta
    device. Without a seed the generator has its own, always the same.

    Raises:
        AdapterError: the matrix has fewer entries; ``key`` is the setting that asks for them.
    """
    view, weight = layer.view, stored_weight(layer)
    size = view.out_features * view.in_features
    if count > size:
        raise AdapterError(f"asks for {count} of the {size} numbers of {name}", key=key)
    generator = torch.Generator() if seed is None else torch.Generator().manual_seed(seed)
    places = torch.randperm(size, generator=generator)[:count].clone()
    return places if weight.is_meta else places.to(weight.device)


def scattered(values: torch.Tensor, places: torch.Tensor, view: Linear) -> torch.Tensor:
    """An (out, in) matrix that is zero but for ``values`` at ``places``."""
    flat = values.new_zeros(view.out_features * view.in_features)
    return flat.index_put((places.to(values.device),), values).view(view.out_features, view.in_features)
