from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jsonschema
import pytest

from peftcli.errors import Problem
from peftcli.recipe import json_schema, load_recipe, read
from peftcli.schema import Recipe

GOOD = """\
base_model: org/model
task: causal_lm
method: {type: lora, r: 4, target_modules: [q_proj, v_proj]}
dataset: {train: org/data, eval: org/held-out}
training:
  output_dir: outputs/run
  learning_rate: 1e-4
"""


@pytest.fixture
def good() -> str:
    return GOOD


@pytest.fixture(scope="session")
def schema() -> jsonschema.Draft202012Validator:
    """The recipe's JSON Schema, ready to check with."""
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema())


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe, by default a good one with lines after it."""

    def write(more: str = "", *, text: str = GOOD, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text + more, encoding="utf-8")
        return path

    return write


@pytest.fixture
def load(write: Callable[..., Path]) -> Callable[..., Recipe]:
    def load(more: str = "", *overrides: str, text: str = GOOD) -> Recipe:
        return load_recipe(write(more, text=text), overrides)

    return load


@pytest.fixture
def problems(write: Callable[..., Path]) -> Callable[..., list[Problem]]:
    """The problems of a recipe; there must be some."""

    def problems(more: str = "", *overrides: str, text: str = GOOD) -> list[Problem]:
        reading = read(write(more, text=text), overrides)
        assert reading.recipe is None
        assert reading.problems
        return reading.problems

    return problems


@pytest.fixture
def problem(problems: Callable[..., list[Problem]]) -> Callable[..., Problem]:
    """The only problem of a recipe."""

    def problem(more: str = "", *overrides: str, text: str = GOOD) -> Problem:
        found: Sequence[Problem] = problems(more, *overrides, text=text)
        assert len(found) == 1, "\n".join(map(str, found))
        return found[0]

    return problem
