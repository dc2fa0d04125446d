"""Trackers of experiments: what metrics.jsonl holds, also there. Whatever goes wrong with one, training goes on.

Each has a thread of its own, so that training waits for none of them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from peftcli.errors import UsageError
from peftcli.recipe import to_dict
from peftcli.schema import Recipe
from peftcli.system.outputs import expand_user
from peftcli.tasks.base import require_extra
from peftcli.train.devices.launch import TRAINING, report
from peftcli.train.events import Message
from peftcli.train.runs.resume import Run
from peftcli.train.runs.typed_json import flatten

_PROJECT_IN = {"wandb": "WANDB_PROJECT", "trackio": "TRACKIO_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}
"""Environment variables that name the project instead."""
_LAST_SECONDS = 60.0
"""Time for the trackers to take what is left when a run is complete."""
_STOPPED_SECONDS = 5.0
"""The same when it is stopped or fails: less than the other processes wait for the main one."""


class Trackers:
    """The trackers of a run, from its first step to its end."""

    def __init__(self, run: Run):
        """Start those of ``training.report_to``, in the main process."""
        folder, attempts = run.folder.path, run.record.attempts
        training = run.recipe.training
        name = training.run_name or expand_user(Path(training.output_dir)).resolve().name
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
        names = training.report_to if run.is_main else []
        self._run, self._trackers = run, [_Tracker(each, own[each], settings) for each in names]
        for tracker in self._trackers:
            tracker.start()

    def log(self, line: Mapping[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        numbers = {key: value for key, value in line.items() if key != "step" and isinstance(value, (int, float))}
        self._leave_out_failed()
        for tracker in self._trackers:
            tracker.count += 1
            tracker.lines.put((int(line["step"]), numbers))

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: object, *_error: object) -> None:
        """End them; warn of those that take too long."""
        for tracker in self._trackers:
            tracker.lines.put(None)
        started, announced = time.monotonic(), False
        while slow := [each for each in self._trackers if each.is_alive()]:
            passed = time.monotonic() - started
            limit = _STOPPED_SECONDS if kind is not None or self._run.stop.signal else _LAST_SECONDS
            if passed > limit:
                break
            if passed > 1 and not announced:
                report(TRAINING, over=True)
                names = " and ".join(each.name for each in slow)
                self._run.tell(Message(f"waiting for {names}, at most {limit:.0f} seconds"))
                announced = True
            time.sleep(0.02)
        self._leave_out_failed()
        for tracker in slow:
            self._run.warn(
                f"{tracker.name} was not done {passed:.0f} seconds after the run: it may lack "
                f"{tracker.count - tracker.shown} of {tracker.count} lines of metrics.jsonl"
            )

    def _leave_out_failed(self) -> None:
        """Do without those that have failed from now on, with a warning."""
        for tracker in [each for each in self._trackers if each.failure]:
            self._trackers.remove(tracker)
            self._run.warn(f"{tracker.name} gets nothing more of this run: {tracker.failure}")


class _Tracker(Thread):
    """A tracker, and the only thread that uses it."""

    def __init__(self, name: str, options: Mapping[str, Any], settings: dict[str, Any]):
        super().__init__(name=name, daemon=True)  # a process that ends does not wait for it
        self.options, self.settings = options, settings
        self.lines = SimpleQueue[tuple[int, dict[str, Any]] | None]()
        """The step and the numbers of each line to show; None at the end."""
        self.count = self.shown = 0
        """How many lines it has been given, and how many of them it has taken."""
        self.failure = ""
        """What went wrong with it."""

    def run(self) -> None:
        """Show the lines until they end; where that fails, note why."""
        try:
            self._show()
        except Exception as error:  # of whatever kind a tracker raises
            logging.getLogger(__name__).debug("%s failed", self.name, exc_info=True)
            said = " ".join(str(error).split())[:200]
            self.failure = f"{type(error).__name__}: {said}"

    def _show(self) -> None:
        build: Any = LOGGER_TYPE_TO_CLASS[self.name]
        project = os.environ.get(_PROJECT_IN[self.name], "peftcli") if self.name in _PROJECT_IN else ""
        tracker = build(project, **self.options)
        tracker.start()
        if self.name != "tensorboard":  # it makes a folder of them, and another one whenever the run goes on
            tracker.store_init_configuration(self.settings)
        while (line := self.lines.get()) is not None:
            step, numbers = line
            tracker.log(numbers, step=step)
            self.shown += 1
        tracker.finish()


def require_packages(recipe: Recipe) -> None:
    """Raise UsageError unless the trackers' packages are installed."""
    for name in recipe.training.report_to:
        require_extra(name, name, "training.report_to", UsageError)
