"""The outcome of a deep check: what is wrong, and what a run would do and need. Needs no torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftcli.data.rows import count_of
from peftcli.errors import PeftcliError, Problem, StorageError
from peftcli.schema import Recipe
from peftcli.system.memory import free_memory, resident_memory
from peftcli.train.runs.folder import RunFolder


@dataclass
class DeepCheck:
    """What opening a recipe's data and model has brought up."""

    errors: list[Problem] = field(default_factory=list)
    exit_code: int = 0
    """That of the first error's kind."""
    would: dict[str, Any] = field(default_factory=dict)
    """What a run would do, as far as it is known."""

    def check_folder(self, recipe: Recipe) -> None:
        """Add an error for an output folder that holds other files, or a damaged run."""
        self._attempt(lambda: RunFolder(Path(recipe.training.output_dir)).read())

    def check_disk(self, recipe: Recipe) -> None:
        """Add an error for a disk without room for what a run writes."""
        if disk := self.would.get("disk"):
            self._attempt(lambda: refuse_full_disk(recipe, disk))

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except PeftcliError as error:
            self.exit_code = self.exit_code or error.exit_code
            text = error.message if error.hint is None else f"{error.message}; {error.hint}"
            self.errors.append(Problem(text, file="", key="training.output_dir"))

    @property
    def warnings(self) -> list[Problem]:
        """What is odd with the data, and that the memory which is free now does not suffice."""
        odd = [Problem(text, file="", key="dataset") for text in self.would.get("warnings", [])]
        memory = self.would.get("memory")
        if not memory or memory["device"] != "cpu":
            return odd
        needs, free = memory["processes"] * memory["peak"], free_memory() + resident_memory()  # this process ends
        if needs <= free:
            return odd
        text = f"a run needs about {needs / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free"
        return [*odd, Problem(text, file="", key="training")]


def refuse_full_disk(recipe: Recipe, needs: Mapping[str, int]) -> None:
    """Check that the file system of the output folder has room for a run's checkpoints and adapter.

    ``needs`` is what ``estimate.bytes_written`` returns. Checkpoints that are in the folder already make room.

    Raises:
        StorageError: it has not.
    """
    folder = RunFolder(Path(recipe.training.output_dir))
    path = folder.path.absolute()
    disk = shutil.disk_usage(next(each for each in (path, *path.parents) if each.is_dir()))
    free = disk.free + sum(path.stat().st_size for path in folder.checkpoints.rglob("*") if path.is_file())
    if needs["peak"] <= free or not disk.total:  # some file systems say nothing of their size
        return
    sizes = {name: f"{count / 1e6:,.1f} MB" for name, count in {**needs, "free": free}.items()}
    checkpoints = f"{count_of(needs['checkpoints'], 'checkpoint')} of {sizes['checkpoint']}"
    raise StorageError(
        f"a run needs {sizes['peak']} there, and {sizes['free']} are free; it writes {checkpoints}, and an "
        f"adapter of {sizes['adapter']}",
        file=str(folder.path),
        key="training.output_dir",
        hint="free some space, name a folder on another disk, lower training.save_total_limit "
        f"({recipe.training.save_total_limit}; one more is there while it is written), or set save_strategy: no",
    )
