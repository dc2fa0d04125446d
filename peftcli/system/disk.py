"""Files and folders that are whole or not there, after a crash too. No torch here."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from peftcli.errors import StorageError

_KEPT_OF_A_NAME = 100
"""Bytes of a file's name that its temporary name repeats, which with its ending must not be longer than 255."""
TEMPORARY = re.compile(r"\..*\.\d+\.tmp", re.DOTALL)
"""The names that ``write_file`` gives files until they are whole."""


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that after a crash it is either as before or whole: temporary file, fsync, rename.

    Raises:
        StorageError: the disk is full, read-only or fails.
    """
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise StorageError(f"cannot write: {error.strerror}", file=str(path)) from None
    except BaseException:  # a signal
        with suppress(OSError):
            temporary.unlink()
        raise


def temporary_name(path: Path) -> Path:
    """Where this process keeps a file or folder until it is whole: beside it, and hidden."""
    kept = os.fsencode(path.name)[:_KEPT_OF_A_NAME].decode(errors="ignore")
    return path.with_name(f".{kept}.{os.getpid()}.tmp")


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make the content of a file that another library wrote last, and give it the mode that the umask wants."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_folder(folder: Path, aside: Path) -> None:
    """Remove a folder by way of the name ``aside``, so that a crash leaves no part of it under its own name."""
    with suppress(OSError):
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)
        shutil.rmtree(aside)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    """``hashlib.file_digest`` for Python 3.10."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
