"""The tensors of a base model's checkpoint, before any quantisation, and those of a new one, written one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from peftcli.errors import ModelError
from peftcli.guard.safetensors_header import BITS
from peftcli.models.open import OpenBase
from peftcli.system.outputs import storage_errors


class BaseWeights:
    """Reads tensors by the names that they have in the model."""

    def __init__(self, base: OpenBase, prefix: str):
        """Find the files.

        Args:
            base: the open base model.
            prefix: the model's ``base_model_prefix``; a checkpoint may lack it, or have it where the model does not.

        Raises:
            ModelError: the model is not stored in safetensors, or one of its files is damaged.
            NetworkError: the hub cannot be reached.
        """
        self.base, self.prefix = base, f"{prefix}."
        self.places: dict[str, Path] = {}
        for shard in base.shards():
            with safe_open(shard, framework="pt") as file:
                self.places |= dict.fromkeys(file.keys(), shard)
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

    Args:
        path: a new file.
        tensors: name -> dtype, as safetensors names it, and shape; and a function that returns the tensor.

    Raises:
        StorageError: the file cannot be written.
    """
    # the widest first, so that each is aligned
    order = sorted(tensors, key=lambda name: (-BITS[tensors[name][0][0]], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        (dtype, shape), _ = tensors[name]
        start, end = end, end + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    described = json.dumps(header, separators=(",", ":")).encode()
    described += b" " * (-len(described) % 8)
    with storage_errors(path):
        file = path.open("wb", buffering=0)
    try:
        _write(file, path, len(described).to_bytes(8, "little") + described)
        for name in order:
            value = tensors[name][1]()
            assert value.nbytes == math.prod(tensors[name][0][1]) * BITS[tensors[name][0][0]] // 8
            _write(file, path, value.detach().reshape(-1).view(torch.uint8).numpy())
            del value  # before the next one is made
    finally:
        with storage_errors(path):
            file.close()


def _write(file: FileIO, path: Path, data: Any) -> None:
    left = memoryview(data)
    with storage_errors(path):
        while left:
            left = left[file.write(left) :]
