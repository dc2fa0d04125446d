"""The base model's tensors as its checkpoint holds them, before any quantisation."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from peftcli.errors import ModelError
from peftcli.models.load import base_files
from peftcli.schema import BaseModel


class BaseWeights:
    """Reads tensors by the names that they have in the model."""

    def __init__(self, base: BaseModel, prefix: str):
        """Finds the files.

        Args:
            base: which model.
            prefix: the model's ``base_model_prefix``; a checkpoint may lack it, or have it where the model does not.

        Raises:
            ModelError: no such model, or it is not stored in safetensors.
            NetworkError: the hub cannot be reached.
        """
        self.base, self.prefix = base, f"{prefix}."
        self.places: dict[str, Path] = {}
        for shard in base_files(base):
            with safe_open(shard, framework="pt") as file:
                self.places |= dict.fromkeys(file.keys(), shard)
        if not self.places:
            raise ModelError(f"{base.name} holds no safetensors, whose weights are needed", key="base_model")

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor called ``name`` in the model, on the CPU.

        Raises:
            ModelError: the checkpoint has none, or quantised it itself.
        """
        spellings = (name, name.removeprefix(self.prefix), self.prefix + name)
        key = next((key for key in spellings if key in self.places), None)
        if key is None:
            raise ModelError(f"{self.base.name} holds no tensor {name}", key="base_model")
        with safe_open(self.places[key], framework="pt") as file:
            value: torch.Tensor = file.get_tensor(key)
        if not value.is_floating_point():
            raise ModelError(f"{self.base.name} holds {name} quantised; its full weight is needed", key="base_model")
        return value
