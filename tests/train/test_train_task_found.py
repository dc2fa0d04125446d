"""Runs of recipes that name no task, and of settings that stand under ``task``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trainkit
from trainkit import run_recipe, run_until, write_recipe

from peftcli.adapters.load import find_adapter
from peftcli.cli.app import main
from peftcli.errors import UsageError
from peftcli.inspection.report import inspect
from peftcli.recipe import load_recipe
from peftcli.train.evaluate_adapter import measure
from peftcli.train.events import Message
from peftcli.train.preview import deep_check

SAID = "task: causal_lm, found from LlamaForCausalLM and the columns messages"


def without_task(path: Path) -> Path:
    path.write_text(path.read_text().replace("task: causal_lm\n", ""))
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return without_task(write_recipe(tmp_path / "left_out"))


def test_it_is_found_said_recorded_and_trained_as_if_it_had_been_named(recipe: Path, tmp_path: Path) -> None:
    named = run_recipe(write_recipe(tmp_path / "named"))
    found = run_recipe(recipe)
    assert SAID in found.warnings
    assert found.run["task"] == named.run["task"]
    assert found.run["task"]["type"] == found.run["recipe"]["task"] == "causal_lm"
    assert load_recipe(found.folder / "recipe.yaml").task == {"type": "causal_lm"}
    assert find_adapter(str(found.folder)).task == "causal_lm"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (found.folder / name).read_bytes() == (named.folder / name).read_bytes()


def test_other_commands_find_it_too(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(recipe)]) == 0
    assert main(["check", "--deep", str(recipe)]) == 0
    assert f"dataset: {SAID}" in capsys.readouterr().out
    settings = load_recipe(recipe)
    events: list[Any] = []
    assert len(inspect(settings, events.append).data.train) == 10
    assert SAID in [event.text for event in events if isinstance(event, Message) and event.is_warning]
    trainkit.reset_accelerate()
    events.clear()
    assert measure(settings, None, events.append)["recipe"]["task"] == "causal_lm"
    assert events[0].text == SAID


def test_where_no_one_task_fits_the_recipe_is_refused_at_its_place(recipe: Path) -> None:
    rows = [{"page": "a", "note": "b"}] * 10
    Path(recipe.parent / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match="no one task fits") as caught:
        run_recipe(recipe)
    assert caught.value.key == "task"
    assert "causal_lm" in str(caught.value.hint)
    (problem,) = deep_check(load_recipe(recipe)).errors
    assert problem.key == "task"


def test_the_other_names_of_columns_count(recipe: Path) -> None:
    rows = [{"ask": "What?", "answer": "That."}] * 10
    Path(recipe.parent / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = "dataset.columns={prompt: ask, completion: answer}"
    done = run_recipe(recipe, columns, "dataset.eval=null", "training.max_steps=1")
    assert done.run["task"]["type"] == "causal_lm"


def test_labels_of_0_and_1_beside_answers_are_asked_about(recipe: Path) -> None:
    rows = [{"prompt": "What?", "completion": " That.", "label": at % 2} for at in range(10)]
    Path(recipe.parent / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match="a label of 0 or 1 may say which answers are good") as caught:
        run_recipe(recipe, "dataset.eval=null")
    assert (
        caught.value.hint == "set task: {type: preference, loss: kto} if 1 marks the good answers, else task: causal_lm"
    )


def test_a_setting_that_the_found_task_lacks_is_refused(tmp_path: Path) -> None:
    path = without_task(write_recipe(tmp_path, trainkit.base_folder("t5", chat=False), trainkit.PROMPTS))
    assert run_recipe(path, "training.max_steps=1").run["task"]["type"] == "seq2seq_lm"
    with pytest.raises(UsageError, match="cannot pack examples") as caught:
        run_recipe(path, "dataset.packing=true", f"training.output_dir={tmp_path}/other")
    assert caught.value.key == "dataset.packing"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ("{max_new_tokens: 7, max_length: 60}", None),
        ("{labels: [a, b]}", "labels: is not a setting of the task causal_lm"),
        ("{loss: dpo}", "loss: is not a setting of the task causal_lm"),
        ("{max_new_tokens: 0}", "max_new_tokens: must be at least 1, not 0"),
    ],
)
def test_settings_without_the_type_are_those_of_the_task_that_is_found(
    recipe: Path, settings: str, problem: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    given = f"task={settings}"
    assert main(["check", "--deep", str(recipe), given]) == (2 if problem else 0)
    assert f"task.{problem}" in (out := capsys.readouterr().out) or (not problem and SAID in out)
    if problem is None:
        run = run_recipe(recipe, given, "training.max_steps=1").run
        task = {key: run["task"][key] for key in ("type", "max_new_tokens", "max_length")}
        assert task == {"type": "causal_lm", "max_new_tokens": 7, "max_length": 60}


def test_settings_under_task_train_as_those_under_dataset(tmp_path: Path) -> None:
    one, other = (write_recipe(tmp_path / name) for name in ("one", "other"))
    few = ("dataset.max_length=96", "training.max_steps=3")
    under = run_recipe(one, *few, "dataset.packing=true")
    own = run_recipe(other, *few, "task={type: causal_lm, packing: true}")
    assert under.run["task"] == own.run["task"]
    assert (own.run["task"]["max_length"], own.run["task"]["packing"]) == (96, True)
    assert under.losses == own.losses


def test_a_run_is_resumed_whether_its_task_is_named_or_found(recipe: Path) -> None:
    settings = ("training.save_strategy=steps", "training.save_steps=2")
    run_until(5, recipe, *settings)
    named = recipe.with_name("named.yaml")
    named.write_text(f"task: causal_lm\n{recipe.read_text()}")
    done = run_recipe(named, *settings)
    assert done.run["attempts"][-1]["from_step"] > 0
    assert done.run["changes"] == []
