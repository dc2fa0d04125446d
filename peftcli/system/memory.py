"""How much memory there is, and when Python looks for garbage."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from peftcli.system.cores import control_groups

_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""By version 2 and 1 of control groups: the files of a group's limit and of what it takes, and the line of memory.stat
that says how much of the latter are files' pages, which are given up when memory is short."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of glibc's ``mallopt``."""
_LARGE = 4 << 20
_postponed = False


def give_back_freed() -> None:
    """Let freed blocks of 4 MiB and more go back to the system at once, where the C library is glibc.

    By itself it comes to keep blocks of up to 32 MiB for later ones, among which they may not fit.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(_MMAP_THRESHOLD, _LARGE)
        set_option(_TRIM_THRESHOLD, 2 * _LARGE)


def free_memory() -> int:
    """Return how many bytes this process may still take: what the machine has free, or its control groups leave."""
    import psutil

    left = (_left(folder, *files) for folder in control_groups("memory") for files in _FILES)
    return int(min(psutil.virtual_memory().available, *left, math.inf))


def _left(folder: Path, limit: str, used: str, pages: str) -> float:
    """Return what a control group leaves; infinite without a limit."""
    try:
        allowed, taken = ((folder / name).read_text().strip() for name in (limit, used))
        lines = dict(line.split(" ") for line in (folder / "memory.stat").read_text().splitlines())
        return math.inf if allowed == "max" else max(0, int(allowed) - int(taken) + int(lines.get(pages, 0)))
    except (OSError, ValueError):
        return math.inf


def resident_memory() -> int:
    """Return how many bytes this process holds."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_resident_memory() -> int:
    """Return the most bytes that this process has held. On Linux not those of the process that started it."""
    with contextlib.suppress(OSError):
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def postponed_collection() -> Iterator[None]:
    """Inside, no garbage is collected before ``collect_from_here``, which every command calls that works long.

    What a command imports, torch and transformers, stays.
    """
    global _postponed
    _postponed = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        collect_from_here()
        gc.unfreeze()


def collect_from_here() -> None:
    """Collect garbage again where that was postponed, and never look at what is there already."""
    global _postponed
    if _postponed:
        _postponed = False
        gc.freeze()
        gc.enable()
