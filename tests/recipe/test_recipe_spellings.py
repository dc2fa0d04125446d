"""Settings that a library has renamed: both spellings are read."""

from __future__ import annotations

from collections.abc import Callable

import jsonschema
import pytest
import yaml

from peftcli.errors import Problem
from peftcli.recipe import explain, to_dict
from peftcli.schema import Recipe


@pytest.mark.parametrize(
    ("more", "value"),
    [
        ("activation_checkpointing: true", True),
        ("activation_checkpointing: auto", "auto"),
        ("gradient_checkpointing: true\n  activation_checkpointing: yes", True),
    ],
)
def test_transformers_new_name_of_gradient_checkpointing(
    load: Callable[..., Recipe], good: str, schema: jsonschema.Draft202012Validator, more: str, value: object
) -> None:
    recipe = load(f"  {more}\n")
    assert recipe.training.gradient_checkpointing == value
    assert "activation_checkpointing" not in to_dict(recipe)["training"]
    given = yaml.safe_load(f"{good}  {more}\n".replace("1e-4", "0.0001"))
    schema.validate(given)
    assert load("", "training.activation_checkpointing=true").training.gradient_checkpointing is True


def test_both_are_refused_where_they_differ(problem: Callable[..., Problem]) -> None:
    found = problem("  gradient_checkpointing: true\n  activation_checkpointing: false\n")
    assert found.key == "training.activation_checkpointing"
    assert found.message.startswith("is another name of training.gradient_checkpointing, and differs from it")
    wrong = problem("  activation_checkpointing: perhaps\n")
    assert wrong.message.startswith("expected true, false, auto or offload")


def test_it_is_explained() -> None:
    assert explain("activation_checkpointing").key == "training.gradient_checkpointing"
