from __future__ import annotations

import json
from importlib import resources

import jsonschema
import pytest
import yaml

from peftcli.errors import UsageError
from peftcli.methods import METHODS
from peftcli.recipe import explain, json_schema, load_recipe, to_dict
from peftcli.recipe.settings import method_settings, sections, settings
from peftcli.schema import Recipe


def test_the_committed_schema_is_current() -> None:
    committed = resources.files("peftcli").joinpath("recipe.schema.json").read_text(encoding="utf-8")
    assert json.loads(committed) == json_schema(), "run: peftcli schema > peftcli/recipe.schema.json"


def test_every_setting_has_help() -> None:
    tables = [settings(Recipe), *(settings(cls) for cls in sections().values()), *map(method_settings, METHODS)]
    assert not [entry.name for table in tables for entry in table.values() if not entry.help]


def test_what_describes_the_file_is_no_setting() -> None:
    assert not {"peft_type", "task_type", "base_model_name_or_path", "fan_in_fan_out"} & set(method_settings("lora"))


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        ({}, True),
        ({"base_model": {"name": "x"}}, True),
        ({"training": {"output_dir": "x", "learning_rate": "${LR}", "bf16": "no"}}, True),
        ({"method": {"type": "prompt_tuning", "num_virtual_tokens": 3}}, True),
        ({"extends": "x.yaml", "training": {}}, True),
        ({"task": "${TASK}", "method": {"type": "${METHOD}", "r": 3}}, True),
        ({"training": {"output_dir": "x", "learning_rate": "${DIGIT}e-5"}}, True),
        ({"training": {"output_dir": 7, "eval_strategy": "${EVALUATE:-no}"}}, True),
        ({"task": {"type": "sequence_classification", "labels": [0, 1]}}, True),
        ({"launch": None, "gates": None, "dataset": {"train": "x", "columns": None}}, True),
        ({"dataset": None}, False),
        ({"training": {}}, False),
        ({"training": {"output_dir": "x", "learning_rate": "x"}}, False),
        ({"training": {"output_dir": "x", "sede": 1}}, False),
        ({"method": {"type": "prompt_tuning", "r": 3}}, False),
        ({"method": {"type": "lora", "r": "eight"}}, False),
        ({"method": {"r": 8}}, False),
        ({"task": "causl_lm"}, False),
        ({"lr": 1}, False),
    ],
)
def test_the_schema_accepts_what_is_valid(
    schema: jsonschema.Draft202012Validator, good: str, change: dict, valid: bool
) -> None:
    recipe = {**yaml.safe_load(good.replace("1e-4", "0.0001")), **change}
    assert schema.is_valid(recipe) is valid


def test_the_schema_accepts_a_resolved_recipe(schema: jsonschema.Draft202012Validator, write) -> None:
    schema.validate(to_dict(load_recipe(write())))


def test_explain_a_setting() -> None:
    found = explain("training.learning_rate")
    assert (found.kind, found.type, found.default) == ("setting", "a number or auto", "auto")
    assert "Peak learning rate" in found.help
    assert found.example == "training:\n  learning_rate: auto"
    assert explain("learning_rate") == found
    assert explain("gates.eval_loss") == explain("gates")
    assert explain("columns.prompt").key == "dataset.columns"
    assert explain("training.output_dir").default == "(required)"
    assert explain("dataset.overlong").allowed == ("truncate", "drop", "error", "split")
    assert explain("training.bf16").type == "true, false or auto"
    assert "causal_lm" in explain("task").allowed
    assert explain("extends").example == "extends: base.yaml"


def test_explain_method_settings() -> None:
    for key in ("lora.r", "method.r"):
        assert explain(key).help.startswith("Size of the bottleneck")
        assert explain(key).example == "method:\n  r: 8"
    assert explain("lora.target_modules").help.startswith("Which modules to adapt")


@pytest.mark.parametrize(
    ("key", "kind", "row"),
    [
        ("training", "section", "seed"),
        ("method", "section", "type"),
        ("lora", "method", "r"),
        ("causal_lm", "task", None),
    ],
)
def test_explain_whole_things(key: str, kind: str, row: str | None) -> None:
    found = explain(key)
    assert found.kind == kind
    assert found.help
    assert row is None or row in [name for name, _, _ in found.settings]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lora_r", "method.r"),
        ("training.learning_rat", "training.learning_rate"),
        ("sede", "seed"),
        ("loar", "lora"),
        ("dataset.mix[0].path", "dataset.train"),
        ("mask_history", "dataset.train_on"),
        ("dpo", "preference.loss"),
        ("qqqq", None),
    ],
)
def test_explain_what_does_not_exist(key: str, meant: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        explain(key)
    assert caught.value.hint == (f"did you mean {meant!r}?" if meant else "`peftcli schema` lists every setting")


def test_the_example_of_a_setting_is_yaml() -> None:
    for section, cls in sections().items():
        for name in settings(cls):
            example = yaml.safe_load(explain(f"{section}.{name}").example or "")
            assert list(example) == [section]
            assert list(example[section]) == [name]
