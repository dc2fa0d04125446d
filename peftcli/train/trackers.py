"""Trackers of experiments: what metrics.jsonl holds, also there. Whatever goes wrong with one, training goes on."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from peftcli.errors import UsageError
from peftcli.recipe import to_dict
from peftcli.schema import Recipe
from peftcli.tasks.base import require_extra
from peftcli.train.runs.resume import Run
from peftcli.train.runs.typed_json import flatten

_PROJECT = "peftcli"
_PROJECT_IN = {"wandb": "WANDB_PROJECT", "trackio": "TRACKIO_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}
"""Environment variables that name the project instead."""


class Trackers:
    """The trackers of a run."""

    def __init__(self, run: Run):
        """Start those of ``training.report_to``, in the main process; warn of those that do not start."""
        folder, attempts = run.folder.path, run.record.attempts
        name = run.recipe.training.run_name or folder.resolve().name
        begun = hashlib.sha256(f"{folder.resolve()} {attempts[0].start}".encode()).hexdigest()[:16]
        own: dict[str, dict[str, Any]] = {
            "tensorboard": {"logging_dir": str(folder / "tensorboard")},
            "wandb": {"name": name, "id": begun, "resume": "allow", "dir": str(folder)},
            "mlflow": {"run_name": name},
            "trackio": {"name": name, "resume": "allow" if attempts[-1].from_step else "never"},
        }
        settings = {
            key: value if isinstance(value, bool | int | float | str | None) else str(value)
            for key, value in flatten(to_dict(run.recipe)).items()
        }
        self._warn, self._started = run.warn, dict[str, GeneralTracker]()
        for tracker in run.recipe.training.report_to if run.is_main else ():
            self._try(tracker, partial(self._start, tracker, own[tracker], settings))

    def _start(self, name: str, options: Mapping[str, Any], settings: dict[str, Any]) -> None:
        build: Any = LOGGER_TYPE_TO_CLASS[name]
        project = os.environ.get(_PROJECT_IN[name], _PROJECT) if name in _PROJECT_IN else ""
        tracker = self._started[name] = build(project, **options)
        tracker.start()
        if name != "tensorboard":  # it makes a folder of them, and another one whenever the run goes on
            tracker.store_init_configuration(settings)

    def log(self, line: Mapping[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        numbers = {key: value for key, value in line.items() if key != "step" and isinstance(value, (int, float))}
        for name, tracker in list(self._started.items()):
            self._try(name, partial(tracker.log, numbers, step=int(line["step"])))

    def close(self) -> None:
        """End them."""
        for name, tracker in list(self._started.items()):
            self._try(name, tracker.finish)
        self._started.clear()

    def _try(self, name: str, action: Callable[[], Any]) -> None:
        """Do something with a tracker; where it fails, do without it from then on."""
        try:
            action()
        except Exception as error:  # of whatever kind a tracker raises
            self._started.pop(name, None)
            logging.getLogger(__name__).debug("%s failed", name, exc_info=True)
            said = " ".join(str(error).split())[:200]
            self._warn(f"{name} gets nothing more of this run: {type(error).__name__}: {said}")


def require_packages(recipe: Recipe) -> None:
    """Raise UsageError unless the trackers' packages are installed."""
    for name in recipe.training.report_to:
        require_extra(name, name, "training.report_to", UsageError)
