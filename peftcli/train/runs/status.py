"""How a run stands, from outside its processes: for ``peftcli status``, and for the launcher of a run."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftcli.errors import Interrupted, PeftcliError, ProcessDied, UsageError
from peftcli.train.runs.folder import RunFolder, checkpoints
from peftcli.train.runs.record import ErrorRecord, RunRecord
from peftcli.train.runs.typed_json import to_json


def status(path: Path) -> dict[str, Any]:
    """Describe the run in a folder, as ``peftcli status --json`` prints it.

    Raises:
        UsageError: there is no run.
        StorageError: run.json cannot be read.
    """
    folder = RunFolder(path)
    record = folder.read() if os.path.lexists(folder.path / "run.json") else None
    if record is None:
        raise UsageError("holds no run", file=str(path), hint="name the training.output_dir of a recipe")
    metrics, found = folder.metrics(), [path.name for path in reversed(checkpoints(folder.checkpoints))]
    steps: dict[str, Any] = to_json(record.steps) if record.steps else {"done": 0, "total": None}
    state = state_of(folder, record)
    if state == "running":
        steps["done"] = max(steps["done"], metrics[-1]["step"] if metrics else 0)
    return {
        "folder": str(path),
        "status": state,
        "exit_code": record.exit_code if state == record.status else 137,
        "error": to_json(record.error),
        "resumable": bool(found) and state != "complete",
        "pid": record.pid or None if state == "running" else None,
        "steps": steps,
        "checkpoints": found,
        "last": metrics[-1] if metrics else None,
        "eval": (record.eval.kept or None) if record.eval else None,
        "gates": to_json(record.gates or []),
        "changes": to_json(record.changes),
        "exact": record.exact,
        "attempts": to_json(record.attempts),
        "replacement": _replacement(folder),
    }


def state_of(folder: RunFolder, record: RunRecord) -> str:
    """Return the status of a run; interrupted, too, when it was killed before it could record so."""
    is_dead = record.status == "running" and not (folder.is_locked() and _may_be_alive(folder, record))
    return "interrupted" if is_dead else record.status


def _may_be_alive(folder: RunFolder, record: RunRecord) -> bool:
    """Whether the process of a run may be the one that holds its folder: another command can hold it too."""
    if _replacement(folder) == "running":
        return False
    if record.host != platform.node() or not record.pid:
        return True
    try:
        os.kill(record.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _replacement(folder: RunFolder) -> str | None:
    """The state of the run that will replace this one; None without one."""
    record = folder.replacement().read()
    return None if record is None else record.status


def read_records(folder: RunFolder) -> list[RunRecord | None]:
    """run.json of a folder, and of the run inside it that will take its place; None where it cannot be read."""
    records = list[RunRecord | None]()
    for each in (folder, folder.replacement()):
        try:
            records.append(each.read())
        except PeftcliError:
            records.append(None)
    return records


def record_failure(folder: RunFolder, error: PeftcliError, before: Sequence[RunRecord | None]) -> None:
    """Record how a run ended whose processes could not record it, or knew less about it than their launcher.

    ``before`` are the run's ``read_records`` before the processes were started. A record that is unchanged since then
    belongs to an earlier attempt.
    """
    for each, record, old in zip((folder, folder.replacement()), read_records(folder), before, strict=True):
        if record is None or record == old or record.status == "complete":
            continue
        if record.exit_code == error.exit_code and not isinstance(error, ProcessDied):
            continue  # the process has recorded it; of one that died, the launcher alone knows how
        ended = replace(record, exit_code=error.exit_code, error=ErrorRecord.of(error))
        ended.status = "interrupted" if isinstance(error, Interrupted) else "failed"
        with suppress(PeftcliError):
            each.write(ended)
