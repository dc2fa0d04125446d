"""The adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.inject import Injection, inject, set_trainable, unload
from peftcli.core.weights import adapter_state, load_state
from peftcli.errors import AdapterError, StorageError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_LARGEST_CONFIG = 1 << 20


def save_adapter(model: nn.Module, config: AdapterConfig, folder: Path, adapter: str | None = None) -> None:
    """Write the model's adapter, or of several the one of that name, into ``folder``. Equal adapters give equal bytes.

    Raises:
        AdapterError: a weight is not finite.
        StorageError: the folder cannot be written.
    """
    write_adapter(adapter_state(model, adapter), config, folder)


def write_adapter(tensors: Mapping[str, torch.Tensor], config: AdapterConfig, folder: Path) -> None:
    """Write an adapter's tensors and config into ``folder``, each file whole or not at all.

    Raises:
        AdapterError: a weight is not finite.
        StorageError: the folder cannot be written.
    """
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise AdapterError(f"{name} is not finite; the adapter is not written")
    # sorted, but not inside: of the patterns that match a module the first one counts
    described = dict(sorted({**config.to_dict(), "inference_mode": True}.items()))
    contents = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    write_file(folder / WEIGHTS_FILE, safetensors.torch.save(contents, {"format": "pt"}))
    write_file(folder / CONFIG_FILE, (json.dumps(described, indent=2) + "\n").encode())


def read_config(folder: Path) -> dict[str, Any]:
    """The object in the folder's ``adapter_config.json``.

    Raises:
        AdapterError: no such file, or it is no JSON object.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"no {CONFIG_FILE} here; this is no adapter folder", file=str(folder))
    if path.stat().st_size > _LARGEST_CONFIG:
        raise AdapterError("larger than 1 MB; this is no adapter config", file=str(path))
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"not valid JSON: {error}", file=str(path)) from None
    if not isinstance(values, dict):
        raise AdapterError("holds no JSON object", file=str(path))
    return values


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors in the folder's ``adapter_model.safetensors``, on the CPU.

    Raises:
        AdapterError: no such file, or it is damaged.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            raise AdapterError(
                "adapter_model.bin is a pickle, which can run code and is not read",
                file=str(folder),
                hint="load it once in PEFT and save it again with safe_serialization=True",
            )
        raise AdapterError(f"no {WEIGHTS_FILE} here", file=str(folder))
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise AdapterError(f"damaged: {error}", file=str(path)) from None


def load_adapter(
    model: nn.Module, config: AdapterConfig, folder: Path, *, trainable: bool = False, adapter: str = "default"
) -> Injection:
    """Inject the config's layers into ``model`` and fill them from the folder's weights.

    ``config.inference_mode`` is on while the layers are made, so that each holds what the file holds.

    Raises:
        AdapterError: the config or the tensors do not fit the model.
    """
    tensors = read_tensors(folder)
    config.inference_mode = True
    injection = inject(model, config, adapter)
    try:
        load_state(model, tensors, str(folder / WEIGHTS_FILE), adapter)
    except AdapterError:
        unload(model, adapter)
        raise
    set_trainable(model, trainable, adapter)
    config.inference_mode = not trainable
    return injection


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that after a crash it is either as before or whole: temporary file, fsync, rename.

    Raises:
        StorageError: the disk is full, read-only or fails.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write: {error.strerror}", file=str(path)) from None


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
