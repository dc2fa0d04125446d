"""Trackers get what metrics.jsonl gets; one that fails is left out."""

from __future__ import annotations

import importlib.util
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking
from trainkit import run_recipe, run_until

from peftcli.errors import UsageError
from peftcli.train import trackers
from peftcli.train.devices.launch import STATUS, TRAINING

NAMES = ("tensorboard", "wandb", "mlflow", "trackio")
Told = dict[str, list[Any]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What stand-ins for the trackers are told; an exception in the place of a list is raised."""
    found: Told = {name: [] for name in NAMES}

    class Tracker:
        def __init__(self, project: str, **options: Any):
            self.name = next(name for name in NAMES if tracking.LOGGER_TYPE_TO_CLASS[name] is type(self))
            self.options = options

        def _tell(self, *what: Any) -> None:
            if isinstance(found[self.name], Exception):
                raise found[self.name]
            found[self.name].append(what)

        def start(self) -> None:
            self._tell("start", self.options)

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self._tell("settings", values)

        def log(self, values: dict[str, Any], step: int) -> None:
            self._tell("log", step, values)

        def finish(self) -> None:
            self._tell("finish")

    for name in NAMES:
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, type(name, (Tracker,), {}))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in NAMES or find(name))
    return found


def test_trackers_get_the_lines_of_metrics_and_their_failures_are_warnings(recipe: Path, told: Told) -> None:
    told["mlflow"] = ConnectionError("no\nserver")
    settings = (
        "training.report_to=[tensorboard, wandb, mlflow, trackio]",
        "training.run_name=mine",
    )
    run_until(4, recipe, *settings)
    told["trackio"] = OSError("disk full")
    done = run_recipe(recipe, *settings)
    steps = [(line["step"], {key: value for key, value in line.items() if key != "step"}) for line in done.metrics]
    assert [tuple(what[1:]) for what in told["wandb"] if what[0] == "log"] == steps
    starts = [what[1] for what in told["wandb"] if what[0] == "start"]
    assert starts[0] == starts[1]
    assert [what[0] for what in told["tensorboard"]].count("finish") == 2
    shown = dict(next(what[1] for what in told["wandb"] if what[0] == "settings"))
    assert shown["training.learning_rate"] == 5e-3
    warned = done.warnings
    assert "mlflow gets nothing more of this run: ConnectionError: no server" in warned
    assert "trackio gets nothing more of this run: OSError: disk full" in warned
    assert done.weights == run_recipe(recipe, f"training.output_dir={recipe.parent}/alone").weights


@pytest.mark.usefixtures("short")
def test_a_run_that_replaces_another_has_the_name_of_its_folder(recipe: Path, told: Told) -> None:
    run_recipe(recipe)
    run_recipe(recipe, "training.seed=3", "training.report_to=[wandb]", overwrite=True)
    assert told["wandb"][0][1]["name"] == "out"


class Slow(list[Any]):
    """A tracker that takes its time."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds

    def append(self, what: Any) -> None:
        time.sleep(self.seconds)
        super().append(what)


def test_training_waits_for_no_tracker(
    recipe: Path, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_LAST_SECONDS", 2.0)
    monkeypatch.setenv(STATUS, str(tmp_path))
    told["wandb"], told["mlflow"] = Slow(0.05), Slow(30.0)
    done = run_recipe(recipe, "training.report_to=[mlflow, wandb]", "training.logging_steps=1")
    steps = [line["step"] for line in done.metrics]
    assert [what[1] for what in told["wandb"] if what[0] == "log"] == steps
    assert told["wandb"][-1] == ("finish",)
    assert not told["mlflow"]
    count = len(steps)
    (warned,) = done.warnings
    assert f"mlflow was not done 2 seconds after the run: it may lack {count} of {count} lines" in warned
    assert not (tmp_path / TRAINING).exists(), "what the launcher takes for waiting for one another"


def test_a_tracker_needs_its_package(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(UsageError, match=r"training\.report_to: needs the package wandb: .*'peftcli\[wandb\]'"):
        run_recipe(recipe, "training.report_to=[wandb]")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", NAMES)
def test_the_trackers_themselves_without_a_network(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr(trackers, "_STOPPED_SECONDS", 60.0)  # this machine may be slow
    pytest.importorskip(name)  # some read the environment then
    settings = (f"training.report_to=[{name}]", "training.logging_steps=1")
    run_until(4, recipe, *settings)
    done = run_recipe(recipe, *settings)
    assert not done.warnings
    losses = {line["step"]: line["loss"] for line in done.metrics}
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(done.folder / "tensorboard"))
        events.Reload()
        assert {each.step: each.value for each in events.Scalars("loss")} == pytest.approx(losses, rel=1e-6)
    elif name == "wandb":
        assert len({path.name.rpartition("-")[2] for path in (done.folder / "wandb").glob("offline-run-*")}) == 1
    elif name == "mlflow":
        with sqlite3.connect(tmp_path / "mlflow.db") as database:
            rows = database.execute("select step, value from metrics where key = 'loss'").fetchall()
        assert dict(rows) == pytest.approx(losses)
    else:
        (file,) = (tmp_path / "trackio").glob("*.db")
        with sqlite3.connect(file) as database:
            steps = [step for (step,) in database.execute("select step from metrics order by step")]
        assert steps == sorted(losses)
