from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trainkit
from classifierkit import ROWS, write_classifier_recipe
from taskkit import CASES
from torch import distributed
from trainkit import read_run, run_recipe, write_recipe

from peftcli.errors import UsageError
from peftcli.system import date

EVALUATES = "training.eval_strategy=epoch"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


@pytest.mark.parametrize("method", [None, trainkit.PROMPT_TUNING], ids=["lora", "prompt_tuning"])
def test_an_adapter_measures_as_in_training(cli: Callable, recipe: Path, method: str | None) -> None:
    settings = [EVALUATES, *([method] if method else [])]
    done = run_recipe(recipe, *settings, "training.eval_on_start=true")
    ran = cli("evaluate", recipe, *settings, "--adapter", done.folder, "--json")
    assert ran.code == 0
    measured = json.loads(ran.out)
    assert measured["eval"]["last"] == pytest.approx(done.run["eval"]["last"], rel=1e-6)
    assert measured["data"]["eval"] == done.run["data"]["eval"]
    assert measured["adapter"] == str(done.folder)
    if not method:  # a new LoRA adapter changes nothing
        base = json.loads(cli("evaluate", recipe, EVALUATES, "--json").out)
        assert base["eval"]["last"] == pytest.approx(done.run["eval"]["first"], rel=1e-6)
        assert base["adapter"] is None


def test_rows_are_rendered_as_on_the_day_of_training(cli: Callable, recipe: Path) -> None:
    dated = recipe.parent / "dated.jinja"
    dated.write_text("{{ strftime_now('%d %b %Y') }}" + trainkit.CHATML)
    settings = (EVALUATES, f"base_model.chat_template={dated}", "training.max_steps=1")
    with date.fixed_date("2024-07-26"):
        done = run_recipe(recipe, *settings)
    measured = json.loads(cli("evaluate", recipe, *settings, "--adapter", done.folder, "--json").out)
    assert measured["data"]["content"] == done.run["data"]["content"][-1:]


def test_a_new_head_is_the_one_that_training_starts_from(cli: Callable, tmp_path: Path) -> None:
    recipe = CASES["a decoder"].write(tmp_path)
    done = run_recipe(recipe, EVALUATES, "training.eval_on_start=true", "training.max_steps=1")
    ran = cli("evaluate", recipe, "--json")
    assert json.loads(ran.out)["eval"]["last"] == pytest.approx(done.run["eval"]["first"], rel=1e-6)
    assert ran.err.count("warning: ") == ran.err.count(" has a new and untrained score: ") == 1
    assert "untrained" not in cli("evaluate", recipe, "--adapter", done.folder).err


def test_another_base_model_and_one_that_is_elsewhere_are_said(
    cli: Callable, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = recipe.parent
    base, other = folder / "base", folder / "other"
    shutil.copytree(trainkit.base_folder(), base)
    shutil.copytree(base, other)
    (other / "config.json").write_text((base / "config.json").read_text() + " ")
    monkeypatch.chdir(folder)
    done = run_recipe(recipe, "base_model=base", "training.max_steps=1")
    assert cli("evaluate", recipe, "base_model=base", "--adapter", done.folder).err.count("warning") == 0
    told = "was trained on base, whose files differ from those of other"
    assert told in cli("evaluate", recipe, "base_model=other", "--adapter", done.folder).err
    asked = ("generate", done.folder, "--prompt", "x", "--max-new-tokens", 1)
    assert told in cli(*asked, "--base", "other").err
    assert told in cli("merge", done.folder, "--base", "other", "--output", folder / "merged").err
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    ran = cli(*asked)
    assert ran.code == 4
    assert "was trained on the folder base, which is not in the current folder\ngive it with --base" in ran.err


def test_it_prints_the_metrics_and_changes_nothing(cli: Callable, recipe: Path) -> None:
    before = trainkit.files_of(recipe.parent)
    ran = cli("evaluate", recipe)
    assert [line.split()[0] for line in ran.out.splitlines()] == ["eval_loss", "eval_perplexity", "eval_token_accuracy"]
    assert trainkit.files_of(recipe.parent) == before


def test_the_held_out_rows_are_those_of_training(cli: Callable, recipe: Path) -> None:
    trainkit.write_rows(recipe.parent / "train.jsonl", trainkit.MESSAGES)
    recipe.write_text(recipe.read_text().replace(f"eval: {recipe.parent}/eval.jsonl", "eval_fraction: 0.3"))
    done = run_recipe(recipe, EVALUATES)
    ran = cli("evaluate", recipe, EVALUATES, "--adapter", done.folder, "--json")
    assert json.loads(ran.out)["eval"]["last"] == pytest.approx(done.run["eval"]["last"], rel=1e-6)


@pytest.mark.parametrize(("gate", "code"), [("<= 100", 0), ("<= 0.01", 12)])
def test_gates(cli: Callable, recipe: Path, gate: str, code: int) -> None:
    ran = cli("evaluate", recipe, EVALUATES, f"gates.eval_loss={gate}", "--json")
    assert ran.code == code
    assert (json.loads(ran.out)["exit_code"], json.loads(ran.out)["gates"][0]["passed"]) == (code, code == 0)
    assert ("eval_loss is" in ran.err) == (code == 12)


def test_a_gate_on_what_is_not_measured(cli: Callable, tmp_path: Path) -> None:
    """By the labels that were found, or by those of the evaluation rows: of one class there is no AUC."""
    recipe = write_classifier_recipe(tmp_path)
    ran = cli("evaluate", recipe, EVALUATES, "gates.eval_top5_accuracy=> 0")
    assert ran.code == 2
    assert "eval_macro_f1, eval_micro_f1, eval_matthews, eval_auc, not eval_top5_accuracy" in ran.err
    trainkit.write_rows(tmp_path / "eval.jsonl", [row for row in ROWS if row["label"] == "good"])
    ran = cli("evaluate", recipe, EVALUATES, "gates.eval_auc=> 0")
    assert ran.code == 12
    assert "eval_auc was not measured, or is not finite, expected > 0" in ran.err


def test_one_process_measures_what_several_trained(cli: Callable, recipe: Path) -> None:
    assert cli("evaluate", recipe, "launch.num_processes=2").code == 0


def test_several_adapters(cli: Callable, recipe: Path) -> None:
    folders = [recipe.parent / f"seed-{seed}" for seed in (1, 2)]
    for seed, folder in enumerate(folders, start=1):
        run_recipe(recipe, f"training.seed={seed}", f"training.output_dir={folder}")
    named = [word for folder in folders for word in ("--adapter", folder)]
    ran = cli("evaluate", recipe, *named, "--json")
    assert ran.err.count("the base model was measured on these rows already") == 1
    found = json.loads(ran.out)
    for folder, row in zip(folders, found["adapters"], strict=True):
        alone = json.loads(
            cli("evaluate", recipe, "--adapter", folder, "training.compare_with_base=true", "--json").out
        )
        assert row["comparison"]["metrics"] == alone["comparison"]["metrics"]
    best = min(found["adapters"], key=lambda row: row["eval"]["last"]["eval_loss"])
    assert found["adapter"] == best["adapter"]
    assert ["against_best" in row for row in found["adapters"]] == [row is not best for row in found["adapters"]]
    values = [row["eval"]["last"]["eval_loss"] for row in found["adapters"]]
    assert found["spread"]["eval_loss"]["deviation"] == pytest.approx(np.std(values, ddof=1))
    lines = cli("evaluate", recipe, *named).out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == list(map(str, folders))
    assert "over 2 seeds" in lines[3]


@pytest.mark.parametrize("failed", [False, True])
def test_a_process_of_a_group_leaves_it(
    cli: Callable, recipe: Path, failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*given: object) -> dict[str, Any]:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        if failed:
            raise UsageError("cannot be measured")
        return {"eval": {"main": "eval_loss", "last": {"eval_loss": 1.0}}, "gates": []}

    monkeypatch.setattr("peftcli.train.evaluate_adapter.measure", measured)
    assert cli("evaluate", recipe).code == (2 if failed else 0)
    assert not distributed.is_initialized()


def test_failures(cli: Callable, recipe: Path, tmp_path: Path) -> None:
    def fails(code: int, said: str, *args: object) -> None:
        ran = cli("evaluate", recipe, *args)
        assert ran.code == code, ran.err
        assert said in ran.err
        assert ran.out == ""

    fails(2, "did you mean", "training.learning_rat=1")
    fails(3, "no evaluation data", "dataset.eval=null")
    (tmp_path / "empty").mkdir()
    fails(4, "adapter_config.json", "--adapter", tmp_path / "empty")
    other = run_recipe(write_recipe(tmp_path / "other", trainkit.base_folder("gpt2"))).folder
    fails(4, "target_modules", "--adapter", other)


def test_encoder_decoder(cli: Callable, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, trainkit.base_folder("t5", chat=False), trainkit.PROMPTS)
    recipe.write_text(recipe.read_text().replace("causal_lm", "seq2seq_lm"))
    done = run_recipe(recipe, EVALUATES)
    ran = cli("evaluate", recipe, EVALUATES, "--adapter", done.folder, "--json")
    assert json.loads(ran.out)["eval"]["last"] == pytest.approx(read_run(done.folder)["eval"]["last"], rel=1e-6)


def test_skipped_rows_are_said(cli, recipe) -> None:
    rows = recipe.parent / "eval.jsonl"
    rows.write_text(rows.read_text() + "{broken\n")
    ran = cli("evaluate", recipe, "dataset.on_bad_row=skip")
    assert ran.code == 0
    assert "warning: bad_rows: 1 of 4 evaluation rows" in ran.err
