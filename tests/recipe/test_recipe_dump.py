from __future__ import annotations

import dataclasses

import pytest

from peftcli.recipe import load_recipe, to_dict, to_yaml
from peftcli.schema import BaseModel, Dataset, Recipe, Training


@pytest.mark.parametrize("overrides", [[], ["method={type: prompt_tuning}"], ["method.rank_pattern={a.b: 3}"]])
def test_round_trip(load, write, overrides: list[str]) -> None:
    recipe = load("gates: {eval_loss: '>= 1'}\n", *overrides)
    assert load_recipe(write(text=to_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    "text",
    ["no", "null", "1e-4", "007", "true", "${HOME}", "$${x}", "a: b", "# x", "ü\u2028\x85", " x ", "1_0", "~", "-"],
)
def test_any_text_survives(write, text: str) -> None:
    recipe = Recipe(
        base_model=BaseModel(name="org/model", revision=text),
        task={"type": "causal_lm"},
        method={"type": "lora", "target_modules": [text]},
        dataset=Dataset(train="org/data", columns={text: text}),
        training=Training(output_dir=text, metric_for_best_model=text),
    )
    again = load_recipe(str(write(text=to_yaml(recipe))))
    assert again.base_model == recipe.base_model
    assert again.dataset == recipe.dataset
    assert again.training == recipe.training
    assert again.method["target_modules"] == [text]


def test_everything_is_written_in_order(load) -> None:
    found = to_dict(load())
    assert list(found) == [entry.name for entry in dataclasses.fields(Recipe)]
    assert list(found["training"]) == [entry.name for entry in dataclasses.fields(Training)]
    assert found["method"]["lora_alpha"] == 8
    assert "fan_in_fan_out" not in found["method"]
