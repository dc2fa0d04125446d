"""The evaluation rows' parts in a run folder, by which a later run is compared with this one row by row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftcli.core.files import read_tensor_file, write_tensor_file
from peftcli.data.store import View
from peftcli.data.used_rows import UsedRows
from peftcli.errors import AdapterError, UsageError
from peftcli.guard.files import read_json_object
from peftcli.tasks.base import Task

ROWS_FILE = "eval_rows.safetensors"
"""In the run folder; not pushed."""
_MAX_NUMBERS = 8_000_000
"""Numbers that are kept of the rows; of more, none are."""
_MAX_RUN = 64_000_000
"""Bytes of a run.json."""
_KEY = "gates.max_regression"
_ROW_HINT = (
    "compare with a run on the same evaluation rows: the files, dataset.limit and the task's settings decide them"
)


def hashes_of(task: Task[Any], view: View) -> np.ndarray:
    """Return a hash of what each row holds, wherever it is from: (N,), int64."""
    names = [name for name in task.columns if name not in task.origins]
    return UsedRows(view).hashes(*names).view(np.int64)


def save_rows(folder: Path, hashes: np.ndarray, base: np.ndarray, adapter: np.ndarray) -> list[str]:
    """Write the parts of each row (N, K), of base model and adapter, and return the file's name; none of too many."""
    if base.size + adapter.size > _MAX_NUMBERS or not (np.isfinite(base).all() and np.isfinite(adapter).all()):
        return []
    tensors = {"hashes": hashes, "base": base, "adapter": adapter}
    write_tensor_file(folder / ROWS_FILE, {name: torch.from_numpy(value) for name, value in tensors.items()})
    return [ROWS_FILE]


@dataclass(frozen=True)
class EarlierRun:
    """An earlier run, and the parts of its evaluation rows."""

    path: str
    run: Mapping[str, Any]
    hashes: np.ndarray
    parts: np.ndarray
    """Of its adapter: (N, K)."""

    @classmethod
    def read(cls, path: str) -> EarlierRun:
        """Read the run.json of a run, and the rows beside it.

        Raises:
            UsageError: they are not there, or hold something else.
        """
        try:
            run = read_json_object(Path(path), _MAX_RUN)
            tensors = read_tensor_file(Path(path).with_name(ROWS_FILE))
            hashes, parts = (tensors[name].numpy() for name in ("hashes", "adapter"))
            if parts.ndim != 2 or hashes.shape != parts.shape[:1]:
                raise KeyError("adapter")
        except (AdapterError, KeyError) as error:
            why = error.message if isinstance(error, AdapterError) else f"{ROWS_FILE} lacks {error}"
            hint = (
                f"name the run.json of a run with training.compare_with_base: true, which writes {ROWS_FILE} beside it"
            )
            raise UsageError(f"cannot be compared with: {why}", file=path, key=_KEY, hint=hint) from None
        return cls(path, run, hashes, parts)

    def refuse_others(self, task: Task[Any], record: Mapping[str, Any], view: View, metrics: list[str]) -> None:
        """Check that this run can be compared with it.

        Raises:
            UsageError: its task, its rows or its metrics are others.
        """
        theirs, ours = (json.loads(json.dumps(each, default=str)) for each in (self.run.get("task") or {}, record))
        if differing := [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]:
            shown = [json.dumps(each.get(differing[0]))[:60] for each in (theirs, ours)]
            message = f"has task.{differing[0]}: {shown[0]}, and this run {shown[1]}"
            raise UsageError(message, file=self.path, key=_KEY, hint="compare with a run of the same task")
        measured = ((self.run.get("comparison") or {}).get("metrics") or {}).keys()
        if missing := [name for name in metrics if name not in measured]:
            message = f"has not measured {missing[0]}; it has {', '.join(measured) or 'no comparison'}"
            raise UsageError(message, file=self.path, key=_KEY)
        mine = hashes_of(task, view)
        if len(mine) != len(self.hashes) or (np.sort(mine) != np.sort(self.hashes)).any():
            same = len(np.intersect1d(mine, self.hashes))
            message = (
                f"has {len(self.hashes):,} evaluation rows, and this run {len(mine):,}, of which {same:,} are there"
            )
            raise UsageError(message, file=self.path, key=_KEY, hint=_ROW_HINT)

    def in_order_of(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of rows with these hashes, and the parts of the same rows in that order."""
        return np.argsort(hashes, kind="stable"), self.parts[np.argsort(self.hashes, kind="stable")]
