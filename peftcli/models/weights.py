"""The tensors of a base model's checkpoint, before any quantisation, and those of a new one, written one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from peftcli.core.files import content_of
from peftcli.errors import ModelError
from peftcli.models.open import OpenBase
from peftcli.system.outputs import storage_errors


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


def write_tensors(
    path: Path, tensors: Mapping[str, tuple[tuple[str, tuple[int, ...]], Callable[[], torch.Tensor]]]
) -> None:
    """Write a safetensors file, with one tensor in memory at a time.

    ``tensors``: name -> dtype, as safetensors names it, and shape; and a function that returns the tensor.

    Raises:
        StorageError: the file cannot be written.
    """
    with storage_errors(path):
        file = path.open("wb", buffering=0)
    try:
        for piece in content_of(tensors):
            _write(file, path, piece)
            del piece  # before the next one is made
    finally:
        with storage_errors(path):
            file.close()


def _write(file: FileIO, path: Path, data: Any) -> None:
    left = memoryview(data)
    with storage_errors(path):
        while left:
            left = left[file.write(left) :]
