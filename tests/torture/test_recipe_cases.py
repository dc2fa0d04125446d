"""Every recipe of the campaign that is wrong by hand, read in this process: what its message, key and line are."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from bad_recipe_cases import CLASSES, Case
from bad_recipes import _judge

from peftcli.recipe import read

CASES = {f"{of}: {name}": case for of, cases in CLASSES.items() for name, case in cases.items()}
CASES = {name: case for name, case in CASES.items() if not "".join(case.args).startswith("--")}  # those read no option


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case: Case = CASES[name]
    text = case.text if isinstance(case.text, bytes) else case.text.encode("utf-8", "surrogatepass")
    (tmp_path / "recipe.yaml").write_bytes(text)
    case.setup(tmp_path)
    monkeypatch.chdir(tmp_path)
    for variable, value in case.env.items():
        monkeypatch.setenv(variable, value)
    reading = read(Path("recipe.yaml"), case.args)
    assert reading.recipe is None
    _judge(case, [asdict(problem) for problem in reading.problems], "command line" if case.args else "recipe.yaml")
