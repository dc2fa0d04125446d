"""Files and folders that are complete or absent, even after a crash. No torch here."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from peftcli.errors import StorageError

_MAX_NAME = 100
"""Bytes of a file's name that its temporary name repeats: the whole temporary name must fit into 255."""
TEMPORARY = re.compile(r"\..*\.\d+\.tmp", re.DOTALL)
"""The names that ``write_file`` gives files until they are complete."""


def write_file(path: Path, content: bytes | Iterable[Any]) -> None:
    """Write a file atomically: temporary file, fsync, rename. After a crash it is as before, or complete.

    ``content`` is all of it, or its pieces, each made when the one before is written.

    Raises:
        StorageError: the disk is full, read-only or fails; or a piece cannot be read from another file.
    """
    name = os.fsencode(path.name)[:_MAX_NAME].decode(errors="ignore")
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    pieces = [content] if isinstance(content, bytes) else _read(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:  # a signal, too
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise cannot_write(path, error.errno, str(error.strerror)) from None
        raise


def cannot_write(path: Path, number: int | None, reason: str) -> StorageError:
    """The error for a file that cannot be written, because of the operating system's error of this number."""
    hint = "free space, then run the same command again" if number in (errno.ENOSPC, errno.EDQUOT) else None
    return StorageError(f"cannot write: {reason}", file=str(path), hint=hint)


def _read(pieces: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from pieces
    except OSError as error:
        raise StorageError(f"cannot read: {error.strerror or error}", file=error.filename) from None


def sync_folder(folder: Path) -> None:
    """Flush a folder's renames, or a file, to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Flush a file that another library wrote to the disk, and give it the mode of the umask."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    sync_folder(path)


def remove_folder(folder: Path, aside: Path) -> None:
    """Rename a folder to ``aside``, then remove it: a crash leaves no partial folder under its own name."""
    with suppress(OSError):
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)
        shutil.rmtree(aside)


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()
