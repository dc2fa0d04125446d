"""The tensors of a base model's checkpoint, before any quantisation."""

from __future__ import annotations

import torch
from safetensors import safe_open

from peftcli.errors import ModelError
from peftcli.models.open import OpenBase


class BaseWeights:
    """Reads tensors by the names that they have in the model."""

    def __init__(self, base: OpenBase, prefix: str):
        """Find the files.

        ``prefix`` is the model's ``base_model_prefix``; a checkpoint may lack it, or have it where the model does not.

        Raises:
            ModelError: the model is not stored in safetensors, or one of its files is damaged.
            NetworkError: the hub cannot be reached.
        """
        self.base, self.prefix = base, f"{prefix}."
        self.places = {name: shard for shard, header in base.shards.items() for name in header}
        if not self.places:
            raise ModelError(f"{base.name} has no safetensors files, whose weights are needed", key="base_model")

    def __call__(self, name: str) -> torch.Tensor:
        """Read the tensor called ``name`` in the model, onto the CPU.

        Raises:
            ModelError: the checkpoint lacks it, or stores it quantised.
        """
        spellings = (name, name.removeprefix(self.prefix), self.prefix + name)
        key = next((key for key in spellings if key in self.places), None)
        if key is None:
            raise ModelError(f"{self.base.name} has no tensor {name}", key="base_model")
        with safe_open(self.places[key], framework="pt") as file:
            value: torch.Tensor = file.get_tensor(key)
        if not value.is_floating_point():
            raise ModelError(f"{self.base.name} stores {name} quantised; its full weight is needed", key="base_model")
        return value
