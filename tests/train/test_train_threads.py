"""How many threads compute: as the user says, else one for each core; a resumed run has as many as before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import trainkit
from trainkit import run_recipe, run_until

from peftcli.train.devices import accelerator, launch


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Nobody has chosen a number of threads."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    yield monkeypatch
    torch.set_num_threads(before)


def on(cores: pytest.MonkeyPatch, count: int) -> None:
    """From here on the machine has so many cores."""
    cores.setattr(accelerator, "usable_cores", lambda: count)
    cores.setattr(accelerator, "_MOST", count)


def test_a_resumed_run_has_as_many_threads_and_the_same_bytes(recipe: Path, cores: pytest.MonkeyPatch) -> None:
    settings = ("training.max_steps=2",)
    on(cores, 2)
    whole = run_recipe(recipe, *settings, f"training.output_dir={recipe.parent}/whole")
    assert whole.run["threads"] == {"count": 2, "reason": "cores"}
    run_until(1, recipe, *settings)
    on(cores, 3)
    done = run_recipe(recipe, *settings)
    assert done.run["threads"] == {"count": 2, "reason": "resumed"}
    assert torch.get_num_threads() == 2
    assert done.run["exact"]
    assert done.weights == whole.weights


def test_a_resumed_run_without_enough_cores_is_not_exact(recipe: Path) -> None:
    path = trainkit.stopped_copy(recipe) / "run.json"
    record = json.loads(path.read_text())
    assert record["threads"] == {"count": 1, "reason": "environment"}
    record["threads"]["count"] = 2
    path.write_text(json.dumps(record))
    done = run_recipe(recipe)
    assert done.run["changes"] == [{"key": "threads", "before": 2, "now": 1, "step": 4}]
    assert not done.run["exact"]
    assert done.run["threads"]["count"] == 1


@pytest.mark.parametrize("given", [None, "3"])
def test_processes_share_the_cores(given: str | None, cores: pytest.MonkeyPatch) -> None:
    cores.setattr(launch, "usable_cores", lambda: 5)
    if given:
        cores.setenv("OMP_NUM_THREADS", given)
    environment = launch.shared_variables(2)
    assert environment.get("OMP_NUM_THREADS") == (None if given else "2")
