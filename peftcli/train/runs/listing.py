"""Every run below a folder: for ``peftcli runs`` and ``peftcli report``. Nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peftcli.errors import PeftcliError, UsageError
from peftcli.reporting.comparing import differing, metrics_of, overlaid
from peftcli.reporting.picture import draw_picture
from peftcli.reporting.run import RunFiles
from peftcli.reporting.write import render, run_files
from peftcli.system.outputs import expand_user, write_output
from peftcli.train.runs.folder import RunFolder
from peftcli.train.runs.status import state_of

_PLOTS = (".png", ".svg")
_COLUMNS = ("name", "status", "base", "method", "time", "memory")
"""What runs are sorted by, beside their metrics and settings."""


def read_run_files(path: Path) -> RunFiles:
    """Return the run in a folder, with its present status.

    Raises:
        UsageError: there is no run.
        StorageError: run.json cannot be read, or is not valid.
    """
    folder = RunFolder(path)
    record = folder.read() if os.path.lexists(folder.path / "run.json") else None
    if record is None:
        raise UsageError("holds no run", file=str(path), hint="name the training.output_dir of a recipe")
    return run_files(folder.path, record.as_dict() | {"status": state_of(folder, record)}, folder.metrics())


def write_report(folders: Sequence[Path], output: Path | None = None) -> list[Path]:
    """Write the report of the run in one folder, or one page that compares several. Returns the files.

    ``output`` names one file, .html or .md; else both are written: into the run folder, or of several runs, as
    comparison.html and comparison.md, into the folder that holds them all.

    Raises:
        UsageError: there is no run in a folder, a folder is named twice, or ``output`` names no page.
        StorageError: a file cannot be read or written.
    """
    if output is not None and output.suffix not in (".html", ".md"):
        raise UsageError("does not name a report", file=str(output), key="--output", hint="end it in .html or .md")
    paths = [expand_user(folder) for folder in folders]
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise UsageError("the same run is named twice", key="RUN")
    made = render([read_run_files(path) for path in paths])
    if output is not None:
        write_output(expand_user(output), made[output.suffix])
        return [output]
    if len(paths) == 1:
        stem = paths[0] / "report"
    else:
        stem = Path(os.path.commonpath([os.path.realpath(path.parent) for path in paths])) / "comparison"
    written = [stem.with_suffix(suffix) for suffix in made]
    for path in written:
        write_output(path, made[path.suffix])
    return written


def list_runs(folder: Path, sort: str | None = None, plot: Path | None = None) -> dict[str, Any]:
    """Describe every run below a folder, as ``peftcli runs --json`` prints it; draw their curves where asked.

    ``sort`` is a metric, a setting, name, status, base, method, time or memory; with a - before it, descending.

    Raises:
        UsageError: there is no such folder, no run in it, nothing of the name ``sort``, or ``plot`` is no picture.
        StorageError: the picture cannot be written.
    """
    if plot is not None and plot.suffix.lower() not in _PLOTS:
        raise UsageError("does not name a picture", file=str(plot), key="--plot", hint="end it in .png or .svg")
    top = expand_user(folder)
    if not top.is_dir():
        raise UsageError("is no folder", file=str(folder), hint="name a folder with run folders in it")
    runs, damaged = list[RunFiles](), list[dict[str, str]]()
    for path in _run_folders(top, damaged):
        try:
            runs.append(read_run_files(path))
        except PeftcliError as error:
            damaged.append({"folder": str(path), "message": error.message})
    if not runs and not damaged:
        raise UsageError("holds no run", file=str(folder), hint="name a folder with run folders in it")
    rows = _described(runs, top)
    if sort is not None and rows:
        order = _sorted(rows, sort)
        runs, rows = [runs[index] for index in order], [rows[index] for index in order]
    if plot is not None:
        _plot(runs, [row["name"] for row in rows], plot)
    return {"folder": str(folder), "runs": rows, "damaged": damaged, "plot": None if plot is None else str(plot)}


def _run_folders(top: Path, damaged: list[dict[str, str]]) -> Iterator[Path]:
    """The folders with a run.json, sorted by path. Hidden folders and checkpoints are not looked into.

    Folders that cannot be read are added to ``damaged``.
    """

    def note(error: OSError) -> None:
        damaged.append({"folder": str(error.filename), "message": f"cannot be read: {error.strerror}"})

    for path, inner, names in os.walk(top, onerror=note):
        if "run.json" in names:
            yield Path(path)
            inner[:] = [name for name in inner if name != "checkpoints"]
        inner[:] = sorted(name for name in inner if not name.startswith("."))


def _described(runs: Sequence[RunFiles], top: Path) -> list[dict[str, Any]]:
    settings = differing([run.values["identity"]["recipe"] for run in runs])
    return [
        {
            "name": os.path.relpath(run.folder, top) if run.folder != top else run.name,
            "folder": str(run.folder),
            "status": run.values["status"],
            "base": run.base,
            "method": run.method,
            "task": run.task,
            "settings": {key: value for key, value in own.items() if key != "task"},
            "main": run.main,
            "metrics": metrics_of(run.values),
            "steps": (run.values.get("steps") or {}).get("done", 0),
            "seconds": run.values.get("wall_seconds"),
            "memory_bytes": _memory(run.values.get("peak_memory_bytes") or {}),
            "gates_passed": all(gate["passed"] for gate in run.values["gates"]) if "gates" in run.values else None,
        }
        for run, own in zip(runs, settings, strict=True)
    ]


def _memory(peak: dict[str, int]) -> int | None:
    return peak.get("cuda", peak.get("rss"))


def _sorted(rows: Sequence[dict[str, Any]], sort: str) -> list[int]:
    """The order of the rows. Those without a value are last."""
    key, descending = sort.removeprefix("-"), sort.startswith("-")
    values = [_value(row, key) for row in rows]
    known = [index for index, value in enumerate(values) if value is not None]
    if not known and key not in _COLUMNS:
        metrics = sorted({name for row in rows for name in row["metrics"]})
        settings = sorted({name for row in rows for name in row["settings"]})
        raise UsageError(
            f"no run has {key}", key="--sort", hint=f"one of {', '.join([*_COLUMNS, *metrics, *settings])}"
        )
    numbers = all(isinstance(values[index], (int, float)) for index in known)
    known.sort(key=lambda index: values[index] if numbers else str(values[index]), reverse=descending)
    return known + [index for index, value in enumerate(values) if value is None]


def _value(row: dict[str, Any], key: str) -> Any:
    if key in row["metrics"]:
        return row["metrics"][key]["value"]
    if key in row["settings"]:
        return row["settings"][key]
    return row.get({"time": "seconds", "memory": "memory_bytes"}.get(key, key)) if key in _COLUMNS else None


def _plot(runs: Sequence[RunFiles], names: Sequence[str], path: Path) -> None:
    keys = dict.fromkeys(["loss", *(run.main for run in runs)])
    charts = [chart for key in keys if (chart := overlaid(runs, names, key)) is not None]
    if not charts:
        raise UsageError("no run has a curve yet", key="--plot")
    write_output(expand_user(path), draw_picture(charts, path.suffix[1:].lower()))
