"""What an adapter folder says before its tensors are read: its config, and the weights' header. No torch here."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_LARGEST_CONFIG = 1 << 20
_LARGEST = 1 << 24
"""Bytes: room for 100,000 tensors."""
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor."""

    dtype: str
    """safetensors' name: F32, BF16, ..."""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def read_config(folder: Path) -> dict[str, Any]:
    """The object in the folder's ``adapter_config.json``.

    Raises:
        AdapterError: no such file, it cannot be read, or it is no JSON object.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"no {CONFIG_FILE} here; this is no adapter folder", file=str(folder))
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise AdapterError("larger than 1 MB; this is no adapter config", file=str(path))
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise AdapterError(f"cannot be read: {error.strerror}", file=str(path)) from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"not valid JSON: {error}", file=str(path)) from None
    if not isinstance(values, dict):
        raise AdapterError("holds no JSON object", file=str(path))
    return values


def checked_config(folder: Path) -> dict[str, Any]:
    """As ``read_config``, of a file that names its method.

    Raises:
        AdapterError: as ``read_config``, or it has no ``peft_type``.
    """
    values = read_config(folder)
    if not isinstance(values.get("peft_type"), str):
        raise AdapterError(
            "holds no adapter config: it names no method", file=str(folder / CONFIG_FILE), key="peft_type"
        )
    return values


def weights_file(folder: Path) -> Path:
    """Path of the folder's weights.

    Raises:
        AdapterError: there is no such file.
    """
    path = folder / WEIGHTS_FILE
    if path.is_file():
        return path
    if (folder / "adapter_model.bin").exists():
        raise AdapterError(
            "adapter_model.bin is a pickle, which can run code and is not read",
            file=str(folder),
            hint="load it once in PEFT and save it again with safe_serialization=True",
        )
    raise AdapterError(f"no {WEIGHTS_FILE} here", file=str(folder))


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name. They fill the file exactly.

    Raises:
        AdapterError: the file cannot be read, or header and size do not agree.
    """
    try:
        with path.open("rb") as file:
            room = path.stat().st_size - 8
            size = int.from_bytes(file.read(8), "little")
            if size > _LARGEST:
                raise AdapterError(f"damaged: its header is larger than {_LARGEST >> 20} MB", file=str(path))
            if size > room:
                raise AdapterError("damaged: it ends within its header", file=str(path))
            text = file.read(size)
    except OSError as error:
        raise AdapterError(f"cannot be read: {error.strerror or error}", file=str(path)) from None
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        header.pop("__metadata__", None)
        ends = [0]
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            if start != ends[-1] or not _fills(entry, end - start):
                raise ValueError(f"{name} is not where its header says")
            ends.append(end)
        if ends[-1] != room - size:
            raise ValueError(f"its header speaks of {ends[-1]:,} bytes of tensors, the file holds {room - size:,}")
        return {name: Entry(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"damaged: {error}", file=str(path)) from None


def _fills(entry: dict[str, Any], size: int) -> bool:
    sound = all(type(length) is int and length >= 0 for length in entry["shape"])
    return sound and math.prod(entry["shape"]) * _BITS[entry["dtype"]] == 8 * size


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("its header names a tensor twice")
    return values
