"""The control groups that limit this process (Linux)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def control_groups(controller: str) -> Iterator[Path]:
    """Yield the folders of the groups that may limit what a controller, as ``cpu``, is for, by version 2 or 1."""
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
