"""The sketches of the gradients of all training rows, in a file that is mapped into memory.

An index is made once, and kept by the content that it follows from. What an unfinished one holds is kept too.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from peftcli.system.disk import sha256, write_file
from peftcli.system.outputs import storage_errors

FORMAT = 1
"""Changes with the layout of the file, and with how sketches are made."""
_CHUNK = 4096
"""Rows that are read together."""


class GradientIndex:
    """The sketch of each row's gradient."""

    def __init__(self, path: Path, width: int, order: np.ndarray):
        """``order`` has the number of the row of each record."""
        self._records = np.memmap(path, _record(width), mode="r")
        self.order = order

    def __len__(self) -> int:
        return len(self._records)

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the numbers of a few rows and their sketches (B, width), until all were there."""
        for start in range(0, len(self), _CHUNK):
            some = self._records[start : start + _CHUNK]
            yield self.order[start : start + _CHUNK], some["values"].astype(np.float32) * some["scale"][:, None]

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Return the sketches of some rows."""
        at = np.argsort(self.order)[numbers]
        return self._records["values"][at].astype(np.float32) * self._records["scale"][at][:, None]


def open_index(
    folder: Path, key: str, width: int, order: np.ndarray, build: Callable[[int], Iterator[np.ndarray]]
) -> GradientIndex:
    """Return the index of ``key``, made first if there is no whole one.

    Args:
        folder: Holds the indexes of a run.
        key: A hash of all that the index follows from.
        width: Numbers of a sketch.
        order: The number of the row of each record.
        build: Yields the sketches of the records from this one on, some at a time.

    Raises:
        StorageError: the folder cannot be written.
    """
    path, about = folder / f"{key}.bin", folder / f"{key}.json"
    if not _is_whole(path, about):
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _build(path, about, width, len(order), build)
    return GradientIndex(path, width, order)


def _build(path: Path, about: Path, width: int, count: int, build: Callable[[int], Iterator[np.ndarray]]) -> None:
    """Write the records that a stopped process has not written, then the description."""
    record, part = _record(width), path.with_suffix(".part")
    with part.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another process may be making it
        if _is_whole(path, about):
            return
        held = file.seek(0, os.SEEK_END) // record.itemsize
        file.truncate(held * record.itemsize)
        for sketches in build(held) if held < count else ():
            file.write(_packed(sketches, record).tobytes())
            file.flush()
        os.fsync(file.fileno())
        part.replace(path)
        write_file(about, json.dumps({"format": FORMAT, "rows": count, "sha256": sha256(path)}).encode())


def _record(width: int) -> np.dtype:
    return np.dtype([("scale", "<f4"), ("values", "<f2", (width,))])


def _packed(sketches: np.ndarray, record: np.dtype) -> np.ndarray:
    """Return sketches as records: float16 has few exponents, so each row has a scale."""
    out = np.zeros(len(sketches), record)
    largest = np.abs(sketches).max(axis=1)
    out["scale"] = largest
    out["values"] = sketches / np.where(largest > 0, largest, 1)[:, None]
    return out


def _is_whole(path: Path, about: Path) -> bool:
    """Return whether an index is complete and undamaged."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        return bool(json.loads(about.read_bytes())["sha256"] == sha256(path))
    return False
