"""The learning rate of a recipe that gives none, and a warning of one that is far from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from trainkit import read_run, run_recipe, write_recipe

from peftcli.cli.app import main
from peftcli.methods import METHODS
from peftcli.recipe import load_recipe
from peftcli.recipe.rates import rate_warning, usual_rate, with_rate
from peftcli.schema import Recipe


@pytest.fixture
def recipe(write: Callable) -> Recipe:
    found = load_recipe(write(), ["training.learning_rate=auto"])
    return replace(found, method={"type": "lora"})


def test_every_method_says_its_rate() -> None:
    silent = [name for name, row in METHODS.items() if "learning_rate" not in vars(row.config_class())]
    assert not silent, "measure it with benchmarks/learning_rates.py"


def test_auto_follows_the_method_its_start_and_the_task(recipe: Recipe) -> None:
    rates = {
        usual_rate(replace(recipe, method=method))
        for method in ({"type": "lora"}, {"type": "lora", "init_lora_weights": "pissa"}, {"type": "ia3"})
    }
    assert len(rates) == 3
    assert usual_rate(replace(recipe, task={"type": "sequence_classification"})) > usual_rate(recipe)


def test_a_number_stays(recipe: Recipe) -> None:
    given = replace(recipe, training=replace(recipe.training, learning_rate=1e-4))
    assert with_rate(given) == given
    assert with_rate(recipe).training.learning_rate == usual_rate(recipe)


@pytest.mark.parametrize(
    ("factor", "words"), [(100, "100 times as large"), (0.02, "50 times as small"), (10, None), (0.1, None), (0, None)]
)
def test_a_rate_that_is_more_than_ten_times_off(recipe: Recipe, factor: float, words: str | None) -> None:
    given = replace(recipe, training=replace(recipe.training, learning_rate=factor * usual_rate(recipe)))
    warning = rate_warning(given)
    assert (warning is None) == (words is None)
    assert (words or "") in (warning or "")


def test_check_warns_where_it_stands(write: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(text="extends: base.yaml\ntraining:\n  learning_rate: 0.5\n")
    write(name="base.yaml")
    assert main(["check", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"warning: {path}:3:18: training.learning_rate: 0.5 is" in out


def test_a_run_warns_too(tmp_path: Path) -> None:
    run = run_recipe(write_recipe(tmp_path), "training.learning_rate=5e-6", "training.max_steps=1")
    assert "training.learning_rate: 5e-06 is 100 times as small as the usual 0.0005" in run.warnings


def test_a_run_records_the_number(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("  learning_rate: 5e-3\n", ""))
    run = run_recipe(path, "training.max_steps=1")
    assert read_run(run.folder)["recipe"]["training"]["learning_rate"] == 5e-4 == run.metrics[0]["learning_rate"]
    assert run_recipe(path, "training.max_steps=1").run == run.run, "the same recipe, so the same run"
