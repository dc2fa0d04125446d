"""The header of a safetensors file, checked before anything of its size is allocated. No torch here."""

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
from peftcli.guard.files import open_regular, os_reason, parse_json_object, read_errors, short_name, short_repr

_MAX_BYTES = 1 << 24
"""Room for 100,000 tensors."""
_MAX_NAME = 4096
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Dtypes by safetensors' names, and the size of a value."""


@dataclass(frozen=True)
class TensorEntry:
    """What the header says of one tensor."""

    dtype: str
    """safetensors' name: F32, BF16, ..."""
    shape: tuple[int, ...]
    start: int
    """Position of its first byte in the file."""
    size: int
    """Bytes."""

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@contextmanager
def open_safetensors(
    path: Path, error: type[PeftcliError] = AdapterError
) -> Iterator[tuple[dict[str, TensorEntry], BufferedReader]]:
    """Open a safetensors file and yield its tensors by name, in the order of their bytes, and the open file.

    Raises ``error`` if the file cannot be read, or its header does not describe all its bytes exactly.
    """
    with _parsed(path, error) as (header, _, file):
        yield header, file


def read_notes(path: Path, error: type[PeftcliError] = AdapterError) -> dict[str, str]:
    """Return the texts, by name, that the header of a safetensors file holds beside its tensors.

    Raises ``error`` as ``open_safetensors`` does.
    """
    with _parsed(path, error) as (_, notes, _):
        return notes


@contextmanager
def _parsed(
    path: Path, error: type[PeftcliError]
) -> Iterator[tuple[dict[str, TensorEntry], dict[str, str], BufferedReader]]:
    """Open a safetensors file and yield its tensors by name, its notes, and the open file."""
    with read_errors(path, error):
        file = open_regular(path)
    with file:
        try:
            header, notes = _parse_header(file)
        except OSError as failure:
            raise error(f"cannot be read: {os_reason(failure)}", file=str(path)) from None
        except KeyError as failure:
            raise error("damaged: its header names it twice", file=str(path), key=short_name(failure.args[0])) from None
        except TypeError:
            raise error("damaged: its header holds no object", file=str(path)) from None
        except RecursionError:
            raise error("damaged: its header is nested too deeply", file=str(path)) from None
        except (UnicodeDecodeError, json.JSONDecodeError) as failure:
            raise error(f"damaged: its header is no JSON: {failure}", file=str(path)) from None
        except ValueError as failure:
            raise error(f"damaged: {failure}", file=str(path)) from None
        yield header, notes, file


def _parse_header(file: BufferedReader) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Parse and check the header of an open file: the entries of its tensors, and its notes."""
    room = os.fstat(file.fileno()).st_size - 8
    size = int.from_bytes(file.read(8), "little")
    if size > _MAX_BYTES:
        raise ValueError(f"its header is larger than {_MAX_BYTES >> 20} MB")
    if size > room:
        raise ValueError("it ends within its header")
    header = parse_json_object(file.read(size).decode())
    notes = header.pop("__metadata__", {})
    if notes is None:  # as MLX writes it
        notes = {}
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise ValueError("its __metadata__ does not map names to texts")
    entries = {name: _entry(name, value, 8 + size) for name, value in header.items()}
    found = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)))
    end = 8 + size
    for name, entry in found.items():
        if entry.start != end:
            raise ValueError(f"{short_name(name)} is not where its header says")
        end += entry.size
    if end != 8 + room:
        raise ValueError(f"its header speaks of {end - 8 - size:,} bytes of tensors, the file holds {room - size:,}")
    return found, notes


def _entry(name: str, value: Any, data: int) -> TensorEntry:
    """Check the header's entry of one tensor; its offsets count from byte ``data`` of the file."""
    if len(name) > _MAX_NAME:
        raise ValueError(f"{short_name(name)} is a name of more than {_MAX_NAME:,} characters")
    if not isinstance(value, dict):
        raise ValueError(f"its header says {short_repr(value)} of {short_name(name)}")
    dtype: Any = value.get("dtype")
    shape: Any = value.get("shape")
    offsets: Any = value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{short_name(name)} has the dtype {short_repr(dtype)}, which is not known")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{short_name(name)} has the shape {short_repr(shape)} at {short_repr(offsets)}")
    start, end = offsets
    if math.prod(shape) * BITS[dtype] != 8 * (end - start):
        raise ValueError(f"{short_name(name)} is not as large as its header says")
    return TensorEntry(dtype, tuple(shape), data + start, end - start)


def _are_sizes(value: Any) -> bool:
    """Return whether the value is a list of at most 64 sizes, PyTorch's limit of dimensions."""
    return isinstance(value, list) and len(value) <= 64 and all(type(v) is int and 0 <= v < 1 << 63 for v in value)
