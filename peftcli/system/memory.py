"""How much memory there is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from peftcli.system.control_groups import control_groups

_NAMES = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
"""A control group's limit and what it takes, by version 2 and 1."""


def free_memory() -> int:
    """Return how many bytes this process may still take: what the machine has free, or its control groups leave."""
    import psutil

    left = (_left(folder, names) for folder in control_groups("memory") for names in _NAMES)
    return int(min(psutil.virtual_memory().available, *left, math.inf))


def _left(folder: Path, names: Sequence[str]) -> float:
    """Return what a control group leaves; infinite without a limit."""
    try:
        limit, used = ((folder / name).read_text().strip() for name in names)
        return math.inf if limit == "max" else max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return math.inf


def resident_memory() -> int:
    """Return how many bytes this process holds."""
    import psutil

    return int(psutil.Process().memory_info().rss)
