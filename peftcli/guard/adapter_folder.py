"""What an adapter folder says before its tensors are read: config, run.json, and the weights' header. No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from peftcli.errors import AdapterError
from peftcli.guard.files import command_word, irregular_kind, read_json_object, short_name
from peftcli.guard.safetensors_header import TensorEntry, open_safetensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
RUN_FILE = "run.json"
_MAX_CONFIG_BYTES, _MAX_RUN_BYTES = 1 << 20, 1 << 24
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
"""Dtypes that tensors of an adapter may have: safetensors' names -> PyTorch's."""


def read_config(folder: Path, name: str = CONFIG_FILE) -> dict[str, Any]:
    """Read the object in the folder's ``adapter_config.json``, or in its file of another name.

    Raises:
        AdapterError: the file is missing, cannot be read, is not a JSON object, or gives a key twice.
    """
    path = folder / name
    if not os.path.lexists(path):
        hint = None
        if os.path.lexists(folder / RUN_FILE):
            hint = f"a run writes its adapter at its end; how it stands: peftcli status {command_word(folder)}"
        elif os.path.lexists(folder / "config.json"):
            hint = "this is a whole model: name it as the base_model of a recipe, or load it with transformers"
        raise AdapterError(f"no {name} here; this is not an adapter folder", file=str(folder), hint=hint)
    return read_json_object(path, _MAX_CONFIG_BYTES)


def read_method_config(folder: Path) -> dict[str, Any]:
    """Read the folder's config, which must name its method.

    Raises:
        AdapterError: as ``read_config``, or it has no ``peft_type``.
    """
    values = read_config(folder)
    if not isinstance(values.get("peft_type"), str):
        raise AdapterError(
            "holds no adapter config: it names no method", file=str(folder / CONFIG_FILE), key="peft_type"
        )
    return values


def read_run(folder: Path) -> dict[str, Any]:
    """Read the ``run.json`` of the run that made the folder; empty if there is none.

    Raises:
        AdapterError: the file cannot be read, or is not a JSON object.
    """
    path = folder / RUN_FILE
    return read_json_object(path, _MAX_RUN_BYTES, strict=False) if os.path.lexists(path) else {}


def find_weights(folder: Path) -> Path:
    """Return the path of the folder's weights.

    Raises:
        AdapterError: there is no such file, or only a pickle.
    """
    path = folder / WEIGHTS_FILE
    if wrong := irregular_kind(path):
        raise AdapterError(wrong, file=str(path))
    if os.path.lexists(path):
        return path
    if os.path.lexists(folder / "adapter_model.bin"):
        raise AdapterError(
            "adapter_model.bin is a pickle, which can run code and is not read",
            file=str(folder),
            hint="load it once in PEFT and save it again with safe_serialization=True",
        )
    raise AdapterError(f"no {WEIGHTS_FILE} here", file=str(folder))


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read the tensors' entries in an adapter's safetensors file, by name.

    Raises:
        AdapterError: the file cannot be read or is damaged, or a tensor has a dtype that no adapter has.
    """
    with open_weights(path) as (header, _):
        return header


@contextmanager
def open_weights(path: Path) -> Iterator[tuple[dict[str, TensorEntry], BufferedReader]]:
    """Read the header as ``read_header`` does, and keep the file open: the tensors are read from the same file.

    Raises:
        AdapterError: as ``read_header``.
    """
    with open_safetensors(path) as (header, file):
        for name, entry in header.items():
            if entry.dtype not in DTYPES:
                raise AdapterError(
                    f"is {entry.dtype}, which no adapter's tensors are", file=str(path), key=short_name(name)
                )
        yield header, file
