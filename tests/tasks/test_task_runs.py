"""What every task is promised of its runs. A new task adds a case to ``taskkit.CASES``."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
import transformers
from jsonschema import Draft202012Validator
from safetensors.torch import load_file, save_file
from taskkit import CASES
from trainkit import Child, Trained, at_step, read_run, run_recipe

from peftcli.adapters.load import apply_adapter, find_adapter
from peftcli.errors import Interrupted
from peftcli.models.open import open_base
from peftcli.output_schemas import output_schema
from peftcli.schema import BaseModel
from peftcli.tasks import TASKS
from peftcli.tasks.base import scores_of

EVALUATES = ("training.eval_strategy=steps", "training.eval_steps=4")
SAVES = ("training.save_strategy=steps", "training.save_steps=3")

pytestmark = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if case.slow else name for name, case in CASES.items()]
)
some_tasks = pytest.mark.grid(keep=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Trained]]:
    """The recipe and the finished run of a task."""
    done: dict[str, tuple[Path, Trained]] = {}

    def get(name: str) -> tuple[Path, Trained]:
        if name not in done:
            recipe = CASES[name].write(tmp_path_factory.mktemp(name))
            done[name] = recipe, run_recipe(recipe, *EVALUATES, *SAVES)
        return done[name]

    return get


def outputs(folder: Path, merged: Path | None = None) -> tuple[Any, Any, torch.Tensor]:
    """The adapter, its task, and what its model, or the merged one, says of the task's probe."""
    source = find_adapter(str(folder))
    with open_base(source.base, processors=source.folder) as opened:
        task = source.open_task(opened)
        auto = source.auto_class(lambda: opened.config)
        if merged is None:
            loaded = opened.model(auto, torch.float32, **source.model_options(opened))
            task.fit_model(loaded.model, None)
            apply_adapter(loaded, source)
            model = loaded.model
        else:
            model = load(merged, auto)
    with torch.no_grad():
        return source, task, scores_of(model.eval()(**task.probe()))


def load(folder: Path, auto: str, **options: Any) -> Any:
    """A model of transformers, or the adapted parts of a pipeline as one module."""
    if hasattr(transformers, auto):
        return getattr(transformers, auto).from_pretrained(folder, ignore_mismatched_sizes=True, **options)
    return open_base(BaseModel(name=str(folder))).model(auto, torch.float32, **options).model


def in_float16(base: Path, folder: Path) -> Path:
    """A copy of a base model, whose weights are float16; a pipeline's parts stay as they are."""
    shutil.copytree(base, folder)
    for path in folder.glob("*.safetensors"):
        save_file({key: tensor.half() for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    for path in folder.glob("config.json"):
        path.write_text(path.read_text().replace('"dtype": "float32"', '"dtype": "float16"'))
    return folder


def test_a_run_learns_and_measures(runs: Callable, name: str) -> None:
    _, run = runs(name)
    task = importlib.import_module(f"peftcli.tasks.{TASKS[CASES[name].task['type']].module}").TASK
    assert run.losses[-1] < run.losses[0] or not task.loss_falls
    assert {f"eval_{metric}" for metric in CASES[name].metrics} <= set(run.run["eval"]["last"])
    if CASES[name].found:
        assert CASES[name].found.items() <= json.loads((run.folder / "task.json").read_text())["settings"].items()
    head = [each for each in load_file(run.folder / "adapter_model.safetensors") if "lora_" not in each]
    assert bool(head) == CASES[name].has_head, "a new head is saved"


@pytest.mark.grid
def test_a_resumed_run_is_the_same_byte_for_byte(runs: Callable, tmp_path: Path, name: str) -> None:
    _, whole = runs(name)
    recipe = CASES[name].write(tmp_path)
    with pytest.raises(Interrupted):
        run_recipe(recipe, *EVALUATES, *SAVES, on_event=at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    resumed = run_recipe(recipe, *EVALUATES, *SAVES)
    for file in trainkit.PRODUCT[:3]:
        assert (resumed.folder / file).read_bytes() == (whole.folder / file).read_bytes(), file


@pytest.mark.slow
def test_two_processes_give_the_series_of_one(runs: Callable, tmp_path: Path, name: str) -> None:
    recipe, one = runs(name)
    if splits := CASES[name].splits():
        one = run_recipe(recipe, *EVALUATES, *splits, f"training.output_dir={tmp_path}/one")
    settings = (f"training.output_dir={tmp_path}/two", "training.per_device_train_batch_size=2", *EVALUATES, *splits)
    children = [Child(tmp_path, "train", recipe, *settings, env=each) for each in trainkit.ranks()]
    assert [child.wait() for child in children] == [0, 0], children[0].err
    losses = [entry["loss"] for entry in trainkit.read_metrics(tmp_path / "two") if "loss" in entry]
    assert losses == pytest.approx(one.losses, rel=1e-4)
    assert read_run(tmp_path / "two")["eval"]["last"] == pytest.approx(one.run["eval"]["last"], rel=1e-4)


@some_tasks
def test_evaluate_and_predict_agree_with_training(runs: Callable, cli: Callable, tmp_path: Path, name: str) -> None:
    recipe, run = runs(name)
    measured = cli("evaluate", recipe, "--adapter", run.folder, "--json")["eval"]["last"]
    assert measured == pytest.approx(run.run["eval"]["last"], rel=1e-5)
    asked = trainkit.write_rows(tmp_path / "asked.jsonl", CASES[name].asked(CASES[name].held_out))
    cli("predict", run.folder, "--input", asked, "--output", tmp_path / "answers.jsonl")
    answers = list(map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines()))
    for metric, value in CASES[name].recompute(CASES[name].held_out, answers).items():
        assert measured[f"eval_{metric}"] == pytest.approx(value), metric


@pytest.mark.grid(keep=3)
def test_answers_are_as_the_schema_says(
    runs: Callable, cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)  # where pictures are written
    asked = trainkit.write_rows(tmp_path / "asked.jsonl", CASES[name].asked(CASES[name].held_out)[:2])
    found = cli("predict", runs(name)[1].folder, "--input", asked, "--json")
    assert len(found["rows"]) == 2
    Draft202012Validator(output_schema("predict")).validate(found)


@some_tasks
def test_a_merged_model_says_the_same(runs: Callable, cli: Callable, tmp_path: Path, name: str) -> None:
    _, run = runs(name)
    cli("merge", run.folder, "--output", tmp_path / "merged")
    expected = outputs(run.folder)[2]
    torch.testing.assert_close(outputs(run.folder, tmp_path / "merged")[2], expected, atol=2e-5, rtol=1e-4)


@some_tasks
def test_peft_says_the_same(runs: Callable, name: str, recwarn: pytest.WarningsRecorder) -> None:
    import peft

    _, run = runs(name)
    source, task, expected = outputs(run.folder)
    base = load(
        Path(run.recipe.base_model.name), source.auto_class(lambda: task.base.config), **source.recorded_options
    )
    model = peft.PeftModel.from_pretrained(base, run.folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(scores_of(model(**task.probe())), expected, atol=1e-5, rtol=1e-4)
    assert [str(each.message) for each in recwarn if "peft" in str(each.filename)] == []


@some_tasks
def test_the_cards_example_runs(
    runs: Callable, name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, run = runs(name)
    base, half = run.recipe.base_model.name, in_float16(Path(run.recipe.base_model.name), tmp_path / "half")
    card = (run.folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    shutil.copytree(run.folder, tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(config.read_text().replace(base, str(half)))
    for folder, adapter in ((base, run.folder), (half, config.parent)):
        exec(code.replace("path/to/this/adapter", str(adapter)).replace("path/to/the/base/model", str(folder)), {})
        assert capsys.readouterr().out.strip()


@pytest.mark.grid
def test_the_commands_know_the_task(runs: Callable, cli: Callable, name: str) -> None:
    recipe, run = runs(name)
    assert "problems" not in cli("check", recipe)
    cli("check", "--deep", recipe)
    cli("info", run.folder)
    assert "examples of a step" in cli("inspect", recipe)
    assert cli("inspect", recipe, "--json")["audit"]["train"]["rows"] == run.run["data"]["rows"]
    cli("train", recipe, "--dry-run")


@pytest.mark.grid
def test_examples_come_from_the_cache(runs: Callable, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = runs(name)
    from peftcli.tasks import TASKS

    task = importlib.import_module(f"peftcli.tasks.{TASKS[CASES[name].task['type']].module}").TASK
    monkeypatch.setattr(task, "encode", lambda *_: pytest.fail("encoded again"))
    run_recipe(recipe, "training.max_steps=1", f"training.output_dir={recipe.parent}/again")
