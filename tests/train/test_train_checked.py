"""A deep check's outcome is known from the last time where nothing that it depends on has changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trainkit
from task_methods import settings_of
from taskkit import CASES

from peftcli.data.cache import clear
from peftcli.recipe import load_recipe
from peftcli.train import examine, preview
from peftcli.train.preview import deep_check

SLOW_TO_IMPORT = {"torch", "transformers", "tokenizers", "datasets", "accelerate"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with a base model of its own."""
    base = shutil.copytree(trainkit.base_folder(), tmp_path / "base")
    return trainkit.write_recipe(tmp_path / "recipe", base)


def state(path: Path, *overrides: str) -> str | None:
    return preview.state_of(load_recipe(path, list(overrides)))


def test_it_is_known_the_second_time_without_torch(recipe: Path) -> None:
    found = deep_check(load_recipe(recipe))
    assert found.errors == []
    assert found.would["parameters"]["trainable"] > 0
    code = (
        "import json, sys; from pathlib import Path\n"
        "from peftcli.recipe import load_recipe; from peftcli.train.preview import preview\n"
        f"print(json.dumps([preview(load_recipe(Path(sys.argv[1]))), sorted({SLOW_TO_IMPORT!r} & set(sys.modules))]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, recipe], cwd=recipe.parent, capture_output=True, text=True, check=True
    )
    assert json.loads(ran.stdout) == [found.would, []]


def test_whatever_it_depends_on_makes_another_state(recipe: Path) -> None:
    base = recipe.parent.parent / "base"
    known = state(recipe)
    assert known is not None
    assert state(recipe, "training.learning_rate=0.1", "training.logging_steps=3") == known
    others = [
        state(recipe, setting)
        for setting in (
            "method.r=3",
            "dataset.max_length=77",
            "training.max_steps=3",
            "training.warmup_steps=9",
            f"base_model={{name: {base}, new_tokens: [<a>]}}",
        )
    ]
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "left"}))
    others.append(state(recipe))
    with (recipe.parent / "train.jsonl").open("a") as file:
        file.write(json.dumps(trainkit.MESSAGES[0]) + "\n")
    others.append(state(recipe))
    assert len({known, *others}) == 1 + len(others)


def test_a_template_that_writes_the_date_holds_for_a_day(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on(day: str) -> str | None:
        with preview.date.fixed_date(day):
            return state(recipe)

    assert on("2026-01-31") == on("2026-02-01")
    (recipe.parent.parent / "base/chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + trainkit.CHATML)
    assert on("2026-01-31") != on("2026-02-01")


@pytest.mark.parametrize(
    "setting",
    ["base_model=./nowhere", "dataset.train=nowhere.jsonl", "task={type: causal_lm, metric_code: mine.py}"],
)
def test_no_state_where_files_are_missing_or_code_runs(
    recipe: Path, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("checks", "data_checks"):
        monkeypatch.setattr(f"peftcli.recipe.{module}.exists", lambda path: True)
    assert state(recipe, setting) is None


def test_errors_and_what_a_cleared_cache_held_are_looked_for_again(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    real = examine.examine
    monkeypatch.setattr(examine, "examine", lambda each: calls.append(each) or real(each))
    wrong = load_recipe(recipe, ["method.target_modules=[nothing]"])
    assert deep_check(wrong).errors == deep_check(wrong).errors != []
    assert len(calls) == 2
    good = load_recipe(recipe)
    assert deep_check(good).would == deep_check(good).would
    assert len(calls) == 3
    clear([])
    deep_check(good)
    assert len(calls) == 4


@pytest.mark.slow
@pytest.mark.parametrize("task", CASES)
@pytest.mark.parametrize("method", ["lora", "ia3", "vera", "prompt_tuning", "ln_tuning", "trainable_tokens"])
def test_what_is_known_is_what_a_full_check_finds(task: str, method: str, tmp_path: Path) -> None:
    recipe = load_recipe(CASES[task].write(tmp_path), [f"method={json.dumps(settings_of(method, task))}"])
    found = [deep_check(recipe), examine.examine(recipe), deep_check(recipe)]
    for each in found:
        for changes in ("packages", "peak"):  # with what this process holds
            (each.would.get("memory") or {}).pop(changes, None)
    assert found[0] == found[1] == found[2]
