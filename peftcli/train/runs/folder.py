"""The run folder: its lock, run.json, metrics.jsonl, and the replacement of an old run by a new one."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from peftcli.errors import FolderBusy, StorageError, UsageError
from peftcli.guard.files import command_word, read_json_object
from peftcli.system.disk import TEMPORARY, remove_folder, sha256, sync_folder, write_file
from peftcli.system.outputs import expand_user, is_at, storage_errors
from peftcli.system.secrets import redact, redact_values
from peftcli.train.runs.record import RunRecord
from peftcli.train.runs.typed_json import WrongValue

LARGEST_RUN = 1 << 26
"""Bytes of run.json."""
_NEW, _OLD = ".overwrite", ".previous.moving"
_MOVING_OUT, _MOVING_IN = "MOVING-OUT", "MOVING-IN"
_OWN = re.compile(
    r"run\.json|train\.log|\.lock|\.?skipped\.jsonl(\.tmp)?|\.overwrite|\.previous\.moving|previous-\d+|lost\+found"
)
"""Files that a run killed at its very beginning may leave, and files beside a run; lost+found is that of a disk."""
_LOCK = "PEFTCLI_LOCK"
"""The environment variable with the file descriptor by which the launcher has locked the folder."""


RESUME_MODES = ("auto", "must", "never")
"""What ``--resume`` takes beside the folder of a checkpoint."""


@dataclass(frozen=True)
class StartOptions:
    """What to do about a run that is in the folder already."""

    resume: str = "auto"
    """``auto``: from the newest whole checkpoint of the folder, if there is one; ``must``: the same, and there must be
    one; ``never``: from the beginning, and there must be no run to resume; or the path of a checkpoint."""
    allow_change: Sequence[str] = ()
    """Keys in which a resumed run may differ from this recipe, as the refusal names them. run.json then records what
    changed, and that the result is not that of one recipe."""
    overwrite: bool = False
    """Whether this run may replace another one, which is moved aside once this one is complete."""


DEFAULTS = StartOptions()


class RunFolder:
    """``training.output_dir``. Only the main process writes to it."""

    def __init__(self, path: Path):
        self.path = path = expand_user(path)
        self.checkpoints = path / "checkpoints"
        self._lock: TextIO | None = None

    def lock(self) -> None:
        """Lock the folder until this process ends, and those that it has given the lock to.

        Raises:
            FolderBusy: another run has locked it.
            StorageError: it cannot be written.
        """
        file = self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            given = os.environ.get(_LOCK)
            if given and is_at(int(given), file):
                self._lock = os.fdopen(os.dup(int(given)), "a")
                return None
            self._lock = file.open("a")
        except OSError as error:
            raise StorageError(f"cannot write: {error.strerror}", file=str(self.path)) from None
        for _ in range(10):
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)  # a process that only looks, as ``is_locked``, unlocks at once
            except OSError as error:
                self.close()
                raise StorageError(f"cannot be locked: {error.strerror}", file=str(file)) from None
        self.close()
        raise FolderBusy("another run is using this folder", file=str(self.path))

    def keep_lock(self) -> None:
        """Lock the folder again if its lock file was removed.

        Raises:
            FolderBusy: another run has locked it since.
            StorageError: it cannot be written.
        """
        if self._lock is None or not is_at(self._lock.fileno(), self.path / ".lock"):
            self.close()
            self.lock()

    def give_lock(self) -> tuple[int, dict[str, str]]:
        """The lock for a process to be started: the file descriptor to pass on, and the variable that names it."""
        assert self._lock is not None
        handle = self._lock.fileno()
        return handle, {_LOCK: str(handle)}

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.close()
        self._lock = None

    def is_locked(self) -> bool:
        """Whether a run has locked the folder."""
        try:
            with (self.path / ".lock").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def read(self) -> RunRecord | None:
        """Read run.json; None when there is none.

        Raises:
            UsageError: the folder holds other files and no run.json.
            StorageError: run.json cannot be read, or is not valid.
        """
        file = self.path / "run.json"
        try:
            if not self.path.exists() and not self.path.is_symlink():
                return None
            if not self.path.is_dir():
                what = "is a file" if self.path.exists() else "is a link that leads nowhere"
                raise UsageError(what, file=str(self.path), key="training.output_dir", hint="name a folder")
            if not os.path.lexists(file):
                self._refuse_foreign()
                return None
            hint = self._ways_on()
            return RunRecord.read(read_json_object(file, LARGEST_RUN, StorageError, strict=False, hint=hint))
        except OSError as error:
            raise StorageError(f"cannot be read: {error.strerror}", file=error.filename or str(self.path)) from None
        except WrongValue as error:
            raise StorageError(f"is not a valid run.json: {error}", file=str(file), hint=hint) from None

    def _ways_on(self) -> str:
        """What to do where run.json is damaged: its checkpoints may be whole."""
        newest = checkpoints(self.checkpoints)[:1]
        resume = "".join(f", with --resume {command_word(path)} to go on from its checkpoint" for path in newest)
        return f"choose another training.output_dir{resume}; or delete that folder"

    def _refuse_foreign(self) -> None:
        names = sorted(entry.name for entry in self.path.iterdir())
        foreign = [name for name in names if not (_OWN.fullmatch(name) or TEMPORARY.fullmatch(name))]
        if foreign and not self.is_replacing():
            raise UsageError(
                f"holds other files ({foreign[0]}) and no run; nothing was changed",
                file=str(self.path),
                key="training.output_dir",
                hint="choose an empty or new folder",
            )

    def tidy(self) -> None:
        """Remove the temporary files of killed runs. The folder must be locked."""
        for entry in self.path.iterdir() if self.path.is_dir() else ():
            if TEMPORARY.fullmatch(entry.name) and entry.is_file() and not entry.is_symlink():
                entry.unlink(missing_ok=True)

    def write(self, record: RunRecord) -> None:
        """Replace run.json atomically."""
        write_file(self.path / "run.json", record.content())

    def write_skipped(self, rows: Iterable[dict[str, Any]]) -> None:
        """List the bad rows in skipped.jsonl; no file where there are none."""
        file = self.path / "skipped.jsonl"
        unfinished = self.path / ".skipped.jsonl.tmp"
        with storage_errors(file):
            with unfinished.open("w", encoding="utf-8") as written:
                written.writelines(json.dumps(redact_values(row), sort_keys=True) + "\n" for row in rows)
            if unfinished.stat().st_size:
                unfinished.replace(file)
            else:
                unfinished.unlink()
                file.unlink(missing_ok=True)

    def note_bug(self, traceback: str) -> None:
        """Append the traceback of an unexpected error to train.log."""
        with (self.path / "train.log").open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(redact(traceback))

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl.

        Raises:
            StorageError: it cannot be written.
        """
        file = self.path / "metrics.jsonl"
        with storage_errors(file), file.open("a") as metrics:
            metrics.write(json.dumps(entry, sort_keys=True) + "\n")

    def sync_metrics(self) -> None:
        """Sync metrics.jsonl to the disk, before a checkpoint that relies on its lines.

        Raises:
            StorageError: they cannot be written.
        """
        file = self.path / "metrics.jsonl"
        with storage_errors(file), file.open("ab") as metrics:
            os.fsync(metrics.fileno())

    def cut_metrics(self, step: int) -> None:
        """Drop the lines of metrics.jsonl after ``step``, which will be written again."""
        kept = [entry for entry in self.metrics() if entry["step"] <= step]
        lines = "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in kept)
        write_file(self.path / "metrics.jsonl", lines.encode())

    def metrics(self) -> list[dict[str, Any]]:
        """The valid lines of metrics.jsonl: a kill may cut the last one short, and others may write there too."""
        file = self.path / "metrics.jsonl"
        entries = []
        try:
            lines = file.read_bytes().splitlines() if file.is_file() else []
        except OSError as error:
            raise StorageError(f"cannot be read: {error.strerror}", file=str(file)) from None
        for line in lines:
            try:
                entry = json.loads(line)
                if type(entry["step"]) is not int or type(entry.get("loss", 0.0)) not in (int, float):
                    continue
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            entries.append(entry)
        return entries

    # --- a new run replaces an old one --------------------------------------------------------------------------------

    def replacement(self) -> RunFolder:
        """The folder of a run that will replace this one once it is complete."""
        return RunFolder(self.path / _NEW)

    def is_replacing(self) -> bool:
        """Whether the replacement of the old run has begun; a kill can stop it midway."""
        return any((self.path / _NEW / name).exists() for name in (_MOVING_OUT, _MOVING_IN))

    def replace(self) -> None:
        """Move the old run aside, as ``previous-1``, and the complete new one into its place.

        Each move is one rename, and a marker says which half is under way, so that a kill between any two of them
        loses nothing: ``finish_replacing`` continues. The folder itself stays, since it may be a mount point.

        Raises:
            StorageError: a file cannot be moved.
        """
        write_file(self.path / _NEW / _MOVING_OUT, b"")
        self.finish_replacing()

    def finish_replacing(self) -> None:
        """Finish a replacement that ``replace`` began, if there is one. The folder must be locked."""
        new, old = self.path / _NEW, self.path / _OLD
        try:
            if (new / _MOVING_OUT).exists():
                for entry in sorted(self.path.iterdir()):
                    stays = entry.name in (".lock", _NEW, _OLD, "lost+found")
                    if not stays and not re.fullmatch(r"previous-\d+", entry.name):
                        old.mkdir(exist_ok=True)
                        entry.rename(old / entry.name)
                if old.exists():
                    numbers = [int(path.name.rpartition("-")[2]) for path in self.path.glob("previous-*")]
                    old.rename(self.path / f"previous-{max(numbers, default=0) + 1}")
                sync_folder(self.path)
                (new / _MOVING_OUT).rename(new / _MOVING_IN)
                sync_folder(new)
            if (new / _MOVING_IN).exists():
                for entry in sorted(new.iterdir()):
                    if entry.name != _MOVING_IN:
                        entry.rename(self.path / entry.name)
                sync_folder(self.path)
                shutil.rmtree(new)
        except OSError as error:
            raise StorageError(f"cannot move: {error.strerror}", file=str(error.filename or self.path)) from None

    def clear(self) -> None:
        """Remove the folder with its content.

        Raises:
            StorageError: it cannot be removed.
        """
        remove_folder(self.path, self.path.with_name(f"{self.path.name}.gone"))
        if self.path.exists():
            raise StorageError("cannot be removed", file=str(self.path))


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints below ``folder``, newest first, unverified."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def refuse_without_product(folder: RunFolder, record: RunRecord) -> None:
    """Raise StorageError when the adapter of a complete run has changed or is gone."""
    for artefact in record.artefacts:
        path = folder.path / artefact.path
        if artefact.path.startswith("adapter_") and not (path.is_file() and sha256(path) == artefact.sha256):
            raise StorageError(
                f"{'has changed' if path.is_file() else 'is gone'} since the run was complete",
                file=str(path),
                hint="choose another training.output_dir to train again, or delete that folder",
            )
