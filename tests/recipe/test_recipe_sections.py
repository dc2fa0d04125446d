"""Settings of a method that hold settings of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from peftcli.errors import Problem
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.initialisations import EvaConfig
from peftcli.recipe import explain, method_config
from peftcli.recipe.dump import to_dict
from peftcli.recipe.reference import json_schema
from peftcli.schema import Recipe

EVA = """\
base_model: org/model
task: causal_lm
method: {type: lora, init_lora_weights: eva, %s}
dataset: {train: org/data}
training: {output_dir: outputs/run}
"""


def test_a_mapping_becomes_the_methods_own_dataclass(load: Callable[..., Recipe]) -> None:
    recipe = load(text=EVA % "eva_config: {rho: 1.5, use_label_mask: no}")
    config = method_config(recipe)
    assert isinstance(config, LoraConfig)
    assert config.eva_config == EvaConfig(rho=1.5, use_label_mask=False)
    assert to_dict(recipe)["method"]["eva_config"]["tau"] == 0.99, "a resolved recipe says all of it"


def test_unset_stays_unset(load: Callable[..., Recipe]) -> None:
    for text in ("r: 8", "eva_config: null", "eva_config:"):
        assert load(text=EVA % text).method["eva_config"] is None


def test_one_setting_of_it_can_be_overridden(load: Callable[..., Recipe]) -> None:
    recipe = load("", "method.eva_config.rho=1", text=EVA % "eva_config: {tau: 0.5}")
    config = method_config(recipe)
    assert isinstance(config, LoraConfig)
    assert config.eva_config == EvaConfig(rho=1, tau=0.5)


@pytest.mark.parametrize(
    ("given", "key", "message"),
    [
        ("{roh: 2}", "method.eva_config.roh", "unknown key"),
        ("{tau: high}", "method.eva_config.tau", "expected a number, found 'high'"),
        ("{rho: 0.5}", "method.eva_config.rho", "must be at least 1, not 0.5"),
        ("3", "method.eva_config", "expected a mapping of settings, found 3"),
        ("[1]", "method.eva_config", "expected a mapping of settings, found a list"),
    ],
)
def test_problems_inside_have_their_place(problem: Callable[..., Problem], given: str, key: str, message: str) -> None:
    found = problem(text=EVA % f"eva_config: {given}")
    assert (found.key, found.message, found.line) == (key, message, 3)
    if key == "method.eva_config.roh":
        assert found.suggestion == "rho"


@pytest.mark.parametrize("key", ["method.eva_config.rho", "lora.eva_config.rho"])
def test_they_are_explained(key: str) -> None:
    found = explain(key)
    assert (found.type, found.default) == ("a number", "2.0")
    assert found.example == "method:\n  eva_config:\n    rho: 2.0"
    whole = explain(key.rpartition(".")[0])
    assert "rho" in [name for name, _, _ in whole.settings]


def test_the_json_schema_knows_them() -> None:
    def errors(eva: Any) -> int:
        method = {"type": "lora", "init_lora_weights": "eva", "eva_config": eva}
        recipe = {"base_model": "m", "task": "causal_lm", "method": method, "dataset": {"train": "d"}}
        recipe["training"] = {"output_dir": "o"}
        return len(list(jsonschema.Draft202012Validator(json_schema()).iter_errors(recipe)))

    assert errors({"rho": 1.5}) == errors(None) == 0
    assert errors({"roh": 1.5}) == errors(3) == 1
