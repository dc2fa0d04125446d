"""Whether a run has learnt anything, and what is said where it has not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from classifierkit import write_classifier_recipe
from trainkit import run_recipe

from peftcli.cli.progress import summary
from peftcli.train.evaluate import find_doubts
from peftcli.train.evaluate_adapter import measure

LM = {"main_metric": "loss", "constant": {"loss": 10.8}}
CLASSES = {"main_metric": "accuracy", "constant": {"accuracy": 0.6, "loss": 0.69}}


def of(loss: float, accuracy: float | None = None) -> dict[str, float]:
    return {"eval_loss": loss} | ({} if accuracy is None else {"eval_accuracy": accuracy})


@pytest.mark.parametrize(
    ("task", "before", "after", "losses", "steps", "said"),
    [
        (
            LM,
            of(3.3),
            of(10.8),
            [],
            8,
            ["eval_loss rose from 3.3000 to 10.8000, no better than a constant answer's 10"],
        ),
        (LM, of(3.3), of(7.5), [], 8, ["eval_loss rose from 3.3000 to 7.5000"]),
        (
            LM,
            {},
            {},
            [5.1, 16.7, 10.8],
            8,
            ["the training loss rose from 5.1000 to 10.8000, no better than a constant"],
        ),
        (
            LM,
            {},
            of(10.8),
            [10.8] * 9,
            99,
            ["the training loss is 10.8000, no better than a constant answer's 10.8000"],
        ),
        (LM, of(3.3), of(3.31), [2.1, 3.5, 2.9], 8, []),  # few steps, and noise between rows
        (LM, {}, {}, [2.1, 3.5, 2.9, 3.4], 99, []),
        (LM, of(10.8), of(10.8), [10.8] * 4, 5, []),
        (LM, of(3.3), of(2.2), [3.2, 2.0], 50, []),
        (
            CLASSES,
            of(0.8, 0.4),
            of(2886, 0.6),
            [0.9, 14748],
            8,
            ["eval_accuracy is 0.6000, no better", "eval_loss rose"],
        ),
        (
            CLASSES,
            {},
            of(0.67, 0.6),
            [0.9, 0.7],
            50,
            ["eval_accuracy is 0.6000, no better than a constant answer's 0.6"],
        ),
        (CLASSES, of(0.2, 0.9), of(0.6, 0.7), [0.2, 0.5], 50, ["eval_loss rose from 0.2000 to 0.6000"]),
        (CLASSES, of(0.8, 0.4), of(0.7, 0.6), [0.9, 0.58], 3, []),
        (CLASSES, of(0.7, 0.5), of(0.95, 0.8), [0.7, 0.1], 99, []),  # too sure, and more often right
    ],
)
def test_what_needs_no_learning_is_told_from_what_does(
    task: Any, before: Any, after: Any, losses: list[float], steps: int, said: list[str]
) -> None:
    stub: Any = SimpleNamespace(
        main_metric=task["main_metric"],
        lower_is_better=("loss",),
        loss_falls=True,
        constant_metrics=lambda view: task["constant"],
    )
    found = find_doubts(stub, SimpleNamespace(), before, after, [{"loss": each} for each in losses], steps)
    assert len(found) == len(said)
    assert all(one.startswith(other) for one, other in zip(found, said, strict=True))


@pytest.mark.parametrize("rate", ["50", "1e-2"])
def test_a_collapsed_run_says_so_and_fails_its_gate(tmp_path: Path, rate: str) -> None:
    settings = ("training.eval_strategy=epoch", "training.eval_on_start=true", "gates.learnt=true")
    run = run_recipe(
        write_classifier_recipe(tmp_path), f"training.learning_rate={rate}", "training.max_steps=30", *settings
    )
    [gate], text = run.run["gates"], summary(run.run, "folder")
    assert "  eval_accuracy  " in text
    if rate != "50":
        assert (gate["passed"], "warnings" in run.run, "push" in text) == (True, False, True)
        return
    [warning] = run.run["warnings"]
    assert warning.startswith("no sign of learning: ")
    assert (f"  warning     {warning}" in text, "push" in text) == (True, False)
    assert (run.run["exit_code"], gate["passed"], gate["reason"]) == (12, False, warning)
    assert (run.folder / "adapter_model.safetensors").is_file()
    assert measure(run.recipe, str(run.folder))["exit_code"] == 12
