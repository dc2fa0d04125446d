from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from peftcli.errors import Problem
from peftcli.train.checked import DeepCheck

SLOW_TO_IMPORT = {"torch", "transformers", "datasets", "accelerate", "huggingface_hub", "rich", "numpy"}


def test_a_good_recipe(cli, recipe) -> None:
    path = recipe()
    assert cli("check", path) == type(cli("check", path))(0, f"ok: {path}\n", "")
    assert json.loads(cli("check", path, "--json").out) == {"errors": [], "warnings": []}


def test_every_mistake_of_several_recipes(cli, recipe) -> None:
    bad, good, worse = recipe("  sede: 1\n", "bad.yaml"), recipe(), recipe("  seed: x\nlr: 1\n", "worse.yaml")
    ran = cli("check", bad, good, worse)
    assert ran.code == 2
    assert ran.out.splitlines() == [
        f"{bad}:7:3: training.sede: unknown key; did you mean 'seed'?",
        f"{bad}: 1 problem",
        f"ok: {good}",
        f"{worse}:7:9: training.seed: expected an integer, found 'x'",
        f"{worse}:8:1: lr: unknown key; did you mean 'training.learning_rate'?",
        f"{worse}: 2 problems",
    ]
    assert ran.err == "more: peftcli explain training.seed\n"


def test_overrides_count_for_all_recipes(cli, recipe) -> None:
    one, other = recipe(), recipe("", "other.yaml")
    ran = cli("check", one, other, "training.seed=x")
    assert ran.code == 2
    assert ran.out.count("training.seed: expected an integer, found 'x'") == 2
    assert cli("check", one, "training.seed=1").code == 0
    assert cli("check", "training.seed=1").code == 2  # no recipe
    assert cli("check", one, f"base_model.name={'x' * 300}").code == 0


def test_json(cli, recipe) -> None:
    path = recipe("  sede: 1\n")
    ran = cli("check", path, path.parent / "none.yaml", "--json")
    assert ran.code == 2
    found = json.loads(ran.out)
    assert found["warnings"] == []
    assert found["errors"][0] == {
        "file": str(path),
        "line": 7,
        "column": 3,
        "key": "training.sede",
        "message": "unknown key",
        "suggestion": "seed",
    }
    assert "no such file" in found["errors"][1]["message"]


def test_foreign_text_cannot_steer_the_terminal(cli, recipe) -> None:
    ran = cli("check", recipe('  "\\e]0;x\\a\\u202e[red]": 1\n'))
    assert "training.\\x1b]0;x\\x07\\u202e[red]: unknown key" in ran.out
    assert ran.out.replace("\n", "").isprintable()


def test_deep_problems_get_their_place(cli, recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def deep_check(_: object) -> DeepCheck:
        odd = ["empty row", "is slow"]
        return DeepCheck([Problem("matches nothing", "", key="method.r")], exit_code=4, would={"warnings": odd})

    module = types.ModuleType("peftcli.train.preview")
    module.deep_check = deep_check  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "peftcli.train.preview", module)
    path = recipe()
    ran = cli("check", path, "--deep")
    assert ran.code == 4
    assert ran.out.splitlines() == [
        f"warning: {path}:4:1: dataset: empty row",
        f"warning: {path}:4:1: dataset: is slow",
        f"{path}:3:25: method.r: matches nothing",
        f"{path}: 1 problem",
    ]
    assert len(json.loads(cli("check", path, "--deep", "--json").out)["warnings"]) == 2


def test_a_folder_of_other_files_is_told_before_training(
    cli, recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("peftcli.train.preview")
    module.deep_check = lambda recipe: DeepCheck()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "peftcli.train.preview", module)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    ran = cli("check", recipe(), f"training.output_dir={tmp_path}/mine", "--deep")
    assert ran.code == 2
    assert "training.output_dir: holds other files (thesis.tex)" in ran.out


def test_nothing_slow_is_imported(recipe) -> None:
    commands = ["--help", f"check {recipe()}", "schema", "explain lora.r", "info methods", "info tasks"]
    code = (
        "import sys; from peftcli.cli.app import main\n"
        "for line in sys.argv[1:]:\n"
        f"    print(main(line.split()), sorted({SLOW_TO_IMPORT!r} & set(sys.modules)), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True, check=True)
    assert ran.stderr == "0 []\n" * len(commands)
