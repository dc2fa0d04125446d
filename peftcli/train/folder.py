"""The run folder: its lock, run.json and metrics.jsonl."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from peftcli.core.files import write_file
from peftcli.errors import FolderBusy, StorageError, UsageError
from peftcli.schema import Recipe

SCHEMA_VERSION = 1
_OWN = re.compile(r"run\.json|\.lock|\.run\.json\.\d+\.tmp|\.?skipped\.jsonl(\.tmp)?")
"""What a run that was killed at its very beginning may leave."""


def is_complete(recipe: Recipe) -> bool:
    """Whether the recipe's run folder holds a run that is complete, be it of this recipe or another."""
    run = RunFolder(Path(recipe.training.output_dir)).read()
    return run is not None and run.get("status") == "complete"


class RunFolder:
    """``training.output_dir``. Only the main process writes to it."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._metrics: TextIO | None = None
        self._lock: TextIO | None = None

    def lock(self) -> None:
        """Hold the folder until this process ends.

        Raises:
            FolderBusy: another run holds it.
            StorageError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a")
        except OSError as error:
            raise StorageError(f"cannot write: {error.strerror}", file=str(self.path)) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.unlock()
            raise FolderBusy("another run is using this folder", file=str(self.path)) from None

    def unlock(self) -> None:
        """Let the folder go."""
        for file in (self._metrics, self._lock):
            if file is not None:
                file.close()
        self._metrics = self._lock = None

    def read(self) -> dict[str, Any] | None:
        """The content of run.json; None when there is none.

        Raises:
            UsageError: the folder holds other files and no run.json.
            StorageError: run.json cannot be read.
        """
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise UsageError("is a file", file=str(self.path), key="training.output_dir", hint="name a folder")
        file = self.path / "run.json"
        if not file.is_file():
            if foreign := sorted(entry.name for entry in self.path.iterdir() if not _OWN.fullmatch(entry.name)):
                raise UsageError(
                    f"holds other files ({foreign[0]}) and no run; nothing was changed",
                    file=str(self.path),
                    key="training.output_dir",
                    hint="choose an empty or new folder",
                )
            return None
        try:
            values = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot be read: {error}", file=str(file)) from None
        if not isinstance(values, dict):
            raise StorageError("holds no JSON object", file=str(file))
        return values

    def write(self, run: dict[str, Any]) -> None:
        """Replace run.json, whole or not at all."""
        content = json.dumps(run, indent=2, sort_keys=True, default=str) + "\n"
        write_file(self.path / "run.json", content.encode())

    def write_skipped(self, rows: Iterable[dict[str, Any]]) -> None:
        """List the rows that could not be used in skipped.jsonl; no file where there are none."""
        file = self.path / "skipped.jsonl"
        unfinished = self.path / ".skipped.jsonl.tmp"
        try:
            with unfinished.open("w", encoding="utf-8") as written:
                written.writelines(json.dumps(row, sort_keys=True) + "\n" for row in rows)
            if unfinished.stat().st_size:
                unfinished.replace(file)
            else:
                unfinished.unlink()
                file.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot be written: {error.strerror}", file=str(file)) from None

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a")
        self._metrics.write(json.dumps(entry, sort_keys=True) + "\n")
        self._metrics.flush()

    def cut_metrics(self, step: int) -> None:
        """Drop the lines of metrics.jsonl after ``step``, which will be written again."""
        kept = [entry for entry in self.metrics() if entry["step"] <= step]
        lines = "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in kept)
        write_file(self.path / "metrics.jsonl", lines.encode())

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line cut short by a kill is left out."""
        file = self.path / "metrics.jsonl"
        entries = []
        for line in file.read_text().splitlines() if file.exists() else []:
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
        return entries
