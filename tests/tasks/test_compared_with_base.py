"""Every task compares the adapter with the base model; the parts of all rows together give the task's metrics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from taskkit import CASES, UNPAIRED
from test_predicted_metrics import MORE
from trainkit import run_recipe

from peftcli.tasks import TASKS
from peftcli.train import compare

KTO = replace(CASES["preference"], task={"type": "preference", "loss": "kto"}, rows=lambda: UNPAIRED)
KNOWN = CASES | MORE | {"kto": KTO}
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * case.slow) for name, case in KNOWN.items()]
COMPARES = ("training.compare_with_base=true", "training.eval_strategy=epoch", "training.eval_on_start=true")


@pytest.mark.parametrize("name", NAMES)
def test_the_rows_of_a_task_add_up_to_its_metrics(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, intervals = list[Any](), compare.intervals
    monkeypatch.setattr(compare, "intervals", lambda *given: seen.append(given) or intervals(*given))
    run = run_recipe(KNOWN[name].write(tmp_path), *COMPARES, "training.max_steps=3").run
    found, kept, first = run["comparison"], run["eval"]["kept"], run["eval"]["first"]
    ((task, *both, _),) = seen
    for measured, known in zip(both, (first, kept), strict=True):
        whole = measured.metrics(task, np.arange(len(measured.scores)))
        sums = measured.parts.metrics_of(measured.parts.values.sum(axis=0, keepdims=True))
        given = {metric: float(value[0]) for metric, value in sums.items() if np.isfinite(value[0])}
        assert given == pytest.approx({metric: whole[metric] for metric in given}, rel=1e-6, abs=1e-9)
        assert whole.keys() - given.keys() <= {"auc", "spearman", "map", "map_50", "map_75"}
        close = {f"eval_{metric}": value for metric, value in whole.items() if f"eval_{metric}" in known}
        assert close == pytest.approx(known, rel=1e-3, abs=1e-3)  # of one row a batch, where rounding is another
    assert (found["main"], found["rows"]) == (run["eval"]["main"], run["data"]["eval"]["used"])
    for each in found["metrics"].values():
        assert each["difference"] == pytest.approx(each["adapter"] - each["base"])
        assert (each["verdict"] == "no_difference") == (each["low"] <= 0 <= each["high"])
    has_rows = "eval_rows.safetensors" in [each["path"] for each in run["artefacts"]]
    assert has_rows == (name != "kto")  # which compares the rows of a batch
    if not TASKS[run["task"]["type"]].writes_text:
        assert task.judges_rows == ("right" in found)
    if right := found.get("right"):
        assert right["base"] == right["kept"] + right["lost"]
    for each in found.get("outputs", []):
        assert ".jsonl" in each["row"]
        assert each["input"]
