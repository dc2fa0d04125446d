"""Soft prompts learn with their defaults, also where a prompt shifts what the targets are."""

from __future__ import annotations

from pathlib import Path

import pytest
from taskkit import CASES
from trainkit import run_recipe


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
@pytest.mark.parametrize("task", ["token_classification", "question_answering"])
def test_soft_prompts_learn_with_their_defaults(tmp_path: Path, task: str, method: str) -> None:
    run = run_recipe(
        CASES[task].write(tmp_path),
        f"method={{type: {method}}}",
        "task.max_length=40",  # the model has 64 positions
        "training.learning_rate=auto",
        "training.max_steps=60",
        "training.eval_strategy=steps",
        "training.eval_steps=60",
        "training.eval_on_start=true",
    )
    first, last = run.run["eval"]["first"], run.run["eval"]["last"]
    assert last["eval_loss"] < 0.75 * first["eval_loss"]
    assert last["eval_f1"] > first["eval_f1"] + 0.2
