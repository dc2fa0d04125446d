"""Whether the disk has room for what a run writes. Needs no torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from peftcli.data.rows import count_of
from peftcli.errors import StorageError
from peftcli.schema import Recipe
from peftcli.train.runs.folder import RunFolder


def refuse_full_disk(recipe: Recipe, needs: Mapping[str, int]) -> None:
    """Check that the file system of the output folder has room for a run's checkpoints and adapter.

    ``needs`` is what ``estimate.bytes_written`` returns. Checkpoints that are in the folder already make room.

    Raises:
        StorageError: it has not.
    """
    folder = RunFolder(Path(recipe.training.output_dir))
    path = folder.path.absolute()
    there = next(each for each in (path, *path.parents) if each.is_dir())
    kept = sum(path.stat().st_size for path in folder.checkpoints.rglob("*") if path.is_file())
    disk = shutil.disk_usage(there)
    free = disk.free + kept
    if needs["peak"] <= free or not disk.total:  # some file systems say nothing of their size
        return
    checkpoints = f"{count_of(needs['checkpoints'], 'checkpoint')} of {_size(needs['checkpoint'])}"
    raise StorageError(
        f"a run needs {_size(needs['peak'])} there, and {_size(free)} are free; it writes {checkpoints}, and an "
        f"adapter of {_size(needs['adapter'])}",
        file=str(folder.path),
        key="training.output_dir",
        hint="free some space, name a folder on another disk, lower training.save_total_limit "
        f"({recipe.training.save_total_limit}; one more is there while it is written), or set save_strategy: no",
    )


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
