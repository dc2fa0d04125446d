"""The processor cores that this process may use, its control groups, and environment variables for torch."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

_SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""The user's own settings."""
_SPINS, _FEW_SPINS = "1000", "0"
"""How often a thread of torch's looks for new work before it gives up its core, some 25 ns each, on a quiet machine and
on a busy one. libgomp's own choice is 300 times the former, and while another process wants the core, all threads wait
for the one that lost it."""
_LOOKS, _PAUSE = 3, 0.002
"""How often this process looks which others run, and the seconds between."""
_KEPT = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""Variables of torch's and of oneDNN's, for the number of kernels that they keep."""
_KERNELS = "64"
"""More than a micro-batch of a Llama needs. A kernel of bfloat16 is made for one number of tokens, in less than a
millisecond, and takes some 0.6 MB; by their own choice, torch and oneDNN keep 1,024."""
_KERNEL_BYTES = 600_000
_LOAD = Path("/proc/loadavg")
_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def set_variables() -> None:
    """Let torch's idle threads give up their cores soon, and let it keep few kernels, unless the user decides.

    Call it before torch is imported.
    """
    if not any(name in os.environ for name in _SPINNING):
        os.environ["GOMP_SPINCOUNT"] = _FEW_SPINS if _others_run() else _SPINS
    for name in _KEPT:
        os.environ.setdefault(name, _KERNELS)


def bytes_of_kernels() -> int:
    """Return how many bytes the kernels of bfloat16 take that oneDNN keeps, once there are as many as it keeps."""
    return int(os.environ.get(_KEPT[1], _KERNELS)) * _KERNEL_BYTES


def _others_run() -> bool:
    """Return whether other processes leave fewer cores than this one may use (Linux)."""
    try:
        running = []
        for _ in range(_LOOKS):
            time.sleep(_PAUSE)
            running.append(int(_LOAD.read_text().split()[3].partition("/")[0]))
    except (OSError, ValueError, IndexError):
        return False
    others = min(running) - 1  # this process is one of them
    return others + usable_cores() > (os.cpu_count() or 1)


def usable_cores() -> int:
    """Return how many cores this process may run on, or what its control group leaves of them; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(allowed, math.inf, *map(_limit, control_groups("cpu")))))


def _limit(folder: Path) -> float:
    """Return how many cores' time a control group has, by version 2 or 1."""
    try:
        if (file := folder / "cpu.max").exists():
            quota, period = file.read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # "max", or a group that is not to be seen in here
        return math.inf


def control_groups(controller: str) -> Iterator[Path]:
    """Yield the groups (Linux) that may limit what a controller is for, as ``cpu``, by version 2 or 1."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:
        return
    for _, controllers, group in (line.split(":", 2) for line in lines):
        if controllers and controller not in controllers.split(","):
            continue
        root = _GROUPS / controllers  # version 2 names none
        path = root / group.lstrip("/")
        yield from (folder for folder in (path, *path.parents) if folder.is_relative_to(root))
