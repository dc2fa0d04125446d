"""A list of sections, as dataset.mix: read, refused, explained and written as a section is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from peftcli.errors import Problem
from peftcli.recipe import explain, json_schema, load_recipe, read, to_dict, to_yaml
from peftcli.recipe.settings import settings
from peftcli.schema import Recipe, Source

MIX = """\
base_model: org/model
task: causal_lm
method: {type: lora, r: 4}
dataset:
  mix:
    - train: org/a
      weight: 3
    - {train: org/b, weight: 1e-1}
  eval: org/held-out
training: {output_dir: outputs/run}
"""
BARE = MIX.replace("      weight: 3\n", "").replace("{train: org/b, weight: 1e-1}", "%s")
"""The second entry, which starts in line 7, column 7, is to be filled in."""


def test_entries_become_sources(load: Callable[..., Recipe]) -> None:
    dataset = load(text=MIX).dataset
    assert dataset.train is None
    assert dataset.mix == [Source(train="org/a", weight=3.0), Source(train="org/b", weight=0.1)]


def test_a_path_alone_is_an_entry(load: Callable[..., Recipe]) -> None:
    assert load(text=BARE % "org/b").dataset.mix == [Source(train="org/a"), Source(train="org/b")]
    assert load(text=BARE % "007").dataset.mix[1] == Source(train="007")


def test_no_entries_are_no_mix(load: Callable[..., Recipe]) -> None:
    for nothing in ("[]", "null", ""):
        assert load("", f"dataset.mix={nothing}").dataset.mix == []


@pytest.mark.parametrize(
    ("entry", "key", "column", "message", "suggestion"),
    [
        ("{train: org/b, wieght: 2}", "dataset.mix[1].wieght", 22, "unknown key", "weight"),
        ("{train: org/b, limit: ten}", "dataset.mix[1].limit", 29, "expected an integer, found 'ten'", None),
        ("{train: org/b, weight: .inf}", "dataset.mix[1].weight", 30, "expected a number, found .inf", None),
        (
            "{train: org/b, format: mesages}",
            "dataset.mix[1].format",
            30,
            "expected auto, text, prompt_completion",
            "messages",
        ),
        ("{limit: 2}", "dataset.mix[1].train", 7, "is required", None),
        ("", "dataset.mix[1].train", 6, "is required", None),
        ("[org/b]", "dataset.mix[1]", 7, "expected a mapping of settings, found a list", None),
        ("true", "dataset.mix[1].train", 7, "expected a string, found true", None),
        (
            "{train: org/b, columns: {prompt: {a: b}}}",
            "dataset.mix[1].columns.prompt",
            40,
            "expected a string or a list of strings, found a mapping",
            None,
        ),
        ("{train: org/b, max_length: 3}", "dataset.mix[1].max_length", 22, "belongs in the section dataset", "dataset"),
        ("{path: org/b, train: org/b}", "dataset.mix[1].path", 8, "unknown key", "train"),
        ("{train: org/b, type: alpaca}", "dataset.mix[1].type", 22, "unknown key", "format"),
        ("{train: '${PEFTCLI_NOT_SET}'}", "dataset.mix[1].train", 15, "PEFTCLI_NOT_SET is not set", None),
    ],
)
def test_problems_have_their_place(
    problem: Callable[..., Problem], entry: str, key: str, column: int, message: str, suggestion: str | None
) -> None:
    found = problem(text=BARE % entry)
    assert message in found.message
    assert (found.key, found.line, found.column) == (key, 7, column)
    assert suggestion is None or (found.suggestion or "").startswith(suggestion)


@pytest.mark.parametrize("value", ["org/a", "{org/a: 1, org/b: 2}", "3"])
def test_what_is_no_list(problem: Callable[..., Problem], value: str) -> None:
    found = problem("", f"dataset.mix={value}", "dataset.train=null")
    assert found.message.startswith("expected a list of mappings, found ")
    assert (found.key, found.suggestion) == ("dataset.mix", "[{train: ...}]")


def test_every_mistake_of_every_entry(problems: Callable[..., list[Problem]]) -> None:
    found = problems("", "dataset.train=null", "dataset.mix=[{trian: a, limit: x}, {train: b, weight: y}, [c]]")
    assert [p.key for p in found] == [
        "dataset.mix[0].trian",
        "dataset.mix[0].train",
        "dataset.mix[0].limit",
        "dataset.mix[1].weight",
        "dataset.mix[2]",
    ]
    assert {p.file for p in found} == {"command line"}


def test_many_entries_are_read_and_looked_up_once(
    problems: Callable[..., list[Problem]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[str] = []
    monkeypatch.setattr("peftcli.recipe.data_checks.closest_file", looked_up.append)
    entries = "".join(f"    - {tmp_path}/{index}.jsonl\n" for index in range(3000))
    found = problems(text=MIX.replace(MIX[MIX.index("    - train") : MIX.index("  eval")], entries))
    assert (len(found), found[-1].message) == (101, "2900 more problems")
    assert len(looked_up) == 20, "a similar name costs the reading of a folder"


def test_overrides_replace_the_list(load: Callable[..., Recipe]) -> None:
    recipe = load("", "dataset.mix=[{train: org/c, weight: 2}]", text=MIX)
    assert recipe.dataset.mix == [Source(train="org/c", weight=2.0)]


def test_extends_replaces_the_list(write: Callable[..., Path]) -> None:
    write(text=MIX, name="base.yaml")
    top = write(text="extends: base.yaml\ndataset: {mix: [org/c], max_length: 7}\n", name="top.yaml")
    dataset = load_recipe(top).dataset
    assert (dataset.mix, dataset.max_length, dataset.eval) == ([Source(train="org/c")], 7, "org/held-out")


def test_places_of_items(write: Callable[..., Path]) -> None:
    reading = read(write(text=MIX))
    for key, line, column in [
        ("dataset.mix", 6, 5),
        ("dataset.mix[0]", 6, 7),
        ("dataset.mix[0].weight", 7, 15),
        ("dataset.mix[1].weight", 8, 30),
        ("dataset.mix[1].limit", 8, 7),
        ("dataset.mix[9]", 6, 5),
    ]:
        place = reading.locate(Problem("", file="", key=key))
        assert (place.line, place.column) == (line, column), key


@pytest.mark.parametrize(
    "override",
    ["dataset.limit=null", "dataset.mix=[{train: 'no', columns: {a: '1e3'}, name: '${x:-1}', limit: 3}, 'null', '7']"],
)
def test_round_trip(load: Callable[..., Recipe], write: Callable[..., Path], override: str) -> None:
    recipe = load("", override, text=MIX)
    assert load_recipe(write(text=to_yaml(recipe))) == recipe


def test_the_resolved_recipe_says_all_of_an_entry(load: Callable[..., Recipe]) -> None:
    written = to_dict(load(text=MIX))
    assert [list(entry) for entry in written["dataset"]["mix"]] == [[f.name for f in dataclasses.fields(Source)]] * 2
    jsonschema.validate(written, json_schema())


def test_recipes_share_no_entries(load: Callable[..., Recipe]) -> None:
    load().dataset.mix.append(Source(train="x"))
    load().base_model.new_tokens.append("x")
    assert (load().dataset.mix, load().base_model.new_tokens) == ([], [])


@pytest.mark.parametrize("key", ["dataset.mix.weight", "dataset.mix[3].weight", "mix.weight"])
def test_a_setting_of_an_entry_is_explained(key: str) -> None:
    found = explain(key)
    assert (found.key, found.type, found.default) == ("dataset.mix.weight", "a number", "(unset)")
    assert found.help.startswith("Share of an epoch's examples from this dataset")
    assert found.example == "dataset:\n  mix:\n    - train: ...\n      weight: 0.1"


def test_the_list_is_explained() -> None:
    found = explain("dataset.mix")
    assert (found.type, found.default) == ("a list of mappings", "[]")
    assert found.example == "dataset:\n  mix: [{train: ...}]"
    assert [name for name, _, _ in found.settings] == list(settings(Source))
    assert explain("dataset.mix.train").example == "dataset:\n  mix:\n    - train: ..."
    assert all(entry.help for entry in settings(Source).values())


def test_a_last_name_is_that_of_the_section_first() -> None:
    assert explain("limit").key == "dataset.limit"
    assert explain("weight").key == "dataset.mix.weight"


def test_the_json_schema_knows_them() -> None:
    def errors(**dataset: Any) -> int:
        recipe = {"base_model": "m", "task": "causal_lm", "method": {"type": "lora"}, "dataset": dataset}
        recipe["training"] = {"output_dir": "o"}
        return len(list(jsonschema.Draft202012Validator(json_schema()).iter_errors(recipe)))

    assert errors(train="a") == errors(mix=["a", {"train": "b", "weight": 2}]) == errors(mix=[], train="a") == 0
    assert errors() == errors(mix="a") == errors(mix=[{"weight": 2}]) == errors(mix=[{"train": "a", "wieght": 2}]) == 1
