"""What an adapter folder says before its tensors are read: its config, and the weights' header. No torch here."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from peftcli.errors import AdapterError, PeftcliError
from peftcli.guard.files import irregular, open_regular, parse_object, read_object, reason, shown, shown_name

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
RUN_FILE = "run.json"
_LARGEST_CONFIG, _LARGEST_RUN = 1 << 20, 1 << 24
_LARGEST = 1 << 24
"""Bytes: room for 100,000 tensors."""
_LONGEST_NAME = 4096
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL", "C64")
"""What an adapter's tensors can be."""


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor."""

    dtype: str
    """safetensors' name: F32, BF16, ..."""
    shape: tuple[int, ...]
    start: int
    """Where its bytes start in the file."""
    size: int
    """How many they are."""

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def read_config(folder: Path) -> dict[str, Any]:
    """The object in the folder's ``adapter_config.json``.

    Raises:
        AdapterError: no such file, it cannot be read, or it is no JSON object, or gives a key twice.
    """
    path = folder / CONFIG_FILE
    if not os.path.lexists(path):
        raise AdapterError(f"no {CONFIG_FILE} here; this is no adapter folder", file=str(folder))
    return read_object(path, _LARGEST_CONFIG)


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


def read_run(folder: Path) -> dict[str, Any]:
    """The object in the ``run.json`` of the run that made an adapter folder; empty where there is none.

    Raises:
        AdapterError: it cannot be read, or is no JSON object.
    """
    path = folder / RUN_FILE
    return read_object(path, _LARGEST_RUN, strict=False) if os.path.lexists(path) else {}


def weights_file(folder: Path) -> Path:
    """Path of the folder's weights.

    Raises:
        AdapterError: there is no such file.
    """
    path = folder / WEIGHTS_FILE
    if wrong := irregular(path):
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


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of an adapter's safetensors file by name. They fill the file exactly.

    Raises:
        AdapterError: the file cannot be read, or header and size do not agree, or a tensor is none of an adapter's.
    """
    with opened_weights(path) as (header, _):
        return header


@contextmanager
def opened_weights(path: Path) -> Iterator[tuple[dict[str, Entry], BufferedReader]]:
    """As ``read_header``; inside, the file is open, so that what is read next is what the header was read of.

    Raises:
        AdapterError: as ``read_header``.
    """
    with opened_safetensors(path) as (header, file):
        for name, entry in header.items():
            if entry.dtype not in DTYPES:
                raise AdapterError(
                    f"is {entry.dtype}, which no adapter's tensors are", file=str(path), key=shown_name(name)
                )
        yield header, file


@contextmanager
def opened_safetensors(
    path: Path, error: type[PeftcliError] = AdapterError
) -> Iterator[tuple[dict[str, Entry], BufferedReader]]:
    """Open a safetensors file: its tensors by name, in the order of their bytes, which they fill exactly.

    Raises ``error`` unless it is a sound file.
    """
    try:
        file = open_regular(path)
    except (OSError, ValueError) as failure:
        raise error(irregular(path) or f"cannot be read: {reason(failure)}", file=str(path)) from None
    with file:
        try:
            header = _parsed(file)
        except OSError as failure:
            raise error(f"cannot be read: {reason(failure)}", file=str(path)) from None
        except KeyError as failure:
            raise error("damaged: its header names it twice", file=str(path), key=shown_name(failure.args[0])) from None
        except TypeError:
            raise error("damaged: its header holds no object", file=str(path)) from None
        except RecursionError:
            raise error("damaged: its header is nested too deeply", file=str(path)) from None
        except (UnicodeDecodeError, json.JSONDecodeError) as failure:
            raise error(f"damaged: its header is no JSON: {failure}", file=str(path)) from None
        except ValueError as failure:
            raise error(f"damaged: {failure}", file=str(path)) from None
        yield header, file


def _parsed(file: BufferedReader) -> dict[str, Entry]:
    """The header of an open file."""
    room = os.fstat(file.fileno()).st_size - 8
    size = int.from_bytes(file.read(8), "little")
    if size > _LARGEST:
        raise ValueError(f"its header is larger than {_LARGEST >> 20} MB")
    if size > room:
        raise ValueError("it ends within its header")
    header = parse_object(file.read(size).decode())
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise ValueError("its __metadata__ is no text by name")
    entries = {name: _entry(name, said, 8 + size) for name, said in header.items()}
    found = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)))
    end = 8 + size
    for name, entry in found.items():
        if entry.start != end:
            raise ValueError(f"{shown_name(name)} is not where its header says")
        end += entry.size
    if end != 8 + room:
        raise ValueError(f"its header speaks of {end - 8 - size:,} bytes of tensors, the file holds {room - size:,}")
    return found


def _entry(name: str, said: Any, data: int) -> Entry:
    """What the header says of one tensor, whose bytes stand behind place ``data``."""
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"{shown_name(name)} is a name of more than {_LONGEST_NAME:,} characters")
    if not isinstance(said, dict):
        raise ValueError(f"its header says {shown(said)} of {shown_name(name)}")
    dtype: Any = said.get("dtype")
    shape: Any = said.get("shape")
    offsets: Any = said.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{shown_name(name)} has the dtype {shown(dtype)}, which is not known")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{shown_name(name)} has the shape {shown(shape)} at {shown(offsets)}")
    start, end = offsets
    if math.prod(shape) * _BITS[dtype] != 8 * (end - start):
        raise ValueError(f"{shown_name(name)} is not as large as its header says")
    return Entry(dtype, tuple(shape), data + start, end - start)


def _is_sizes(value: Any) -> bool:
    """Whether it is a list of lengths; no tensor has more dimensions than PyTorch's 64."""
    return isinstance(value, list) and len(value) <= 64 and all(type(v) is int and 0 <= v < 1 << 63 for v in value)
