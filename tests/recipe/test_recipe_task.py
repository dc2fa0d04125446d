"""``task``: a name, a mapping with settings, or left out; settings that may stand under ``dataset`` too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from peftcli.recipe import explain, load_recipe, to_dict, to_yaml
from peftcli.tasks import row_of

BARE = "task: causal_lm\n"


@pytest.fixture
def task(good: str, load: Callable) -> Callable[..., Any]:
    """The recipe with another ``task``."""
    return lambda text, *overrides: load("", *overrides, text=good.replace(BARE, text))


@pytest.fixture
def problem(good: str, problems: Callable) -> Callable[..., Any]:
    def problem(text: str, *overrides: str) -> Any:
        (found,) = problems("", *overrides, text=good.replace(BARE, text))
        return found

    return problem


def test_a_name_and_a_mapping_with_the_name_are_one(task: Callable) -> None:
    assert task(BARE) == task("task: {type: causal_lm}\n") == task("task:\n  type: causal_lm\n")
    assert task(BARE).task == {"type": "causal_lm"}


@pytest.mark.parametrize("text", ["", "task:\n", "task: null\n"])
def test_it_may_be_left_out(task: Callable, text: str) -> None:
    assert task(text).task is None
    assert to_dict(task(text))["task"] is None


def test_settings_may_stand_under_dataset_too(task: Callable) -> None:
    here = task("task: {type: causal_lm, max_length: 77, train_on: all}\n")
    there = task(BARE, "dataset.max_length=77", "dataset.train_on=all")
    assert here == there
    assert here.dataset.max_length == 77
    settings = row_of(here).settings_of(here)
    assert (settings.max_length, settings.train_on, settings.packing) == (77, "all", False)


def test_both_places_of_one_file_must_agree_and_a_later_layer_wins(
    good: str, load: Callable, problems: Callable, write: Callable
) -> None:
    text = good.replace(BARE, "task: {type: causal_lm, max_length: 77}\n")
    both = text.replace("held-out}", "held-out, max_length: %s}")
    assert load(text=both % 77).dataset.max_length == 77
    (found,) = problems(text=both % 78)
    assert (found.key, found.line, found.column) == ("task.max_length", 2, 37)
    assert found.message == "differs from dataset.max_length; give it only once"
    assert load("", "dataset.max_length=5", text=both % 78).dataset.max_length == 5
    assert load("", "dataset.max_length=5", "task.max_length=6", text=text).dataset.max_length == 6
    write(text=text, name="base.yaml")
    assert load(text="extends: base.yaml\ndataset: {max_length: 7}\n").dataset.max_length == 7


@pytest.mark.parametrize(
    ("text", "key", "message", "suggestion"),
    [
        ("task: causal\n", "task", "unknown task: 'causal'; known: ", "causal_lm"),
        ("task: CAUSAL_LM\n", "task", "unknown task: 'CAUSAL_LM'; known: ", "causal_lm"),
        ("task: {type: causel_lm}\n", "task.type", "unknown task: 'causel_lm'; known: ", "causal_lm"),
        ("task: text-classification\n", "task", "unknown task: ", "sequence_classification"),
        ("task: dpo\n", "task", "unknown task: 'dpo'; known: ", "{type: preference, loss: dpo}"),
        ("task: {packing: true, box_format: xywh}\n", "task.type", "no task has all of these settings", None),
        ("task: [causal_lm]\n", "task", "expected a mapping of settings, found a list", None),
        ("task: {type: causal_lm, max_lenght: 5}\n", "task.max_lenght", "unknown key", "max_length"),
        ("task: {type: causal_lm, seed: 5}\n", "task.seed", "belongs in the section training", "training.seed"),
        ("task: {type: seq2seq_lm, packing: true}\n", "task.packing", "not a setting of seq2seq_lm, only of", None),
        ("task: {type: causal_lm, max_length: many}\n", "task.max_length", "expected an integer, found 'many'", None),
        ("task: {type: causal_lm, max_length: 0}\n", "dataset.max_length", "must be at least 1, not 0", None),
        ("task: {type: seq2seq_lm, overlong: split}\n", "task.overlong", "expected truncate, drop or error", None),
        ("task: {type: causal_lm, num_beams: 0}\n", "task.num_beams", "must be at least 1, not 0", None),
        ("task: {type: question_answering, stride: -1}\n", "task.stride", "must not be negative, found -1", None),
        ("task: {type: preference, beta: 0}\n", "task.beta", "must be above 0, not 0", None),
        (
            "task: {type: semantic_segmentation, ignore_index: 65536}\n",
            "task.ignore_index",
            "must be at most 65,535, found 65536",
            None,
        ),
        ("task: {type: preference, label_smoothing: 0.5}\n", "task.label_smoothing", "must be below 0.5", None),
        (
            "task: {type: sequence_classification, class_weights: {a: -1}}\n",
            "task.class_weights",
            "a: must not be negative",
            None,
        ),
        ("task: {type: feature_extraction, mini_batch_size: 0}\n", "task.mini_batch_size", "at least 1", None),
    ],
)
def test_mistakes_have_their_place(problem: Callable, text: str, key: str, message: str, suggestion: str) -> None:
    found = problem(text)
    assert found.key == key
    assert message in found.message
    assert found.suggestion == suggestion
    assert found.line == 2
    assert found.column > 1 or key == "task.type"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.packing=true", "the task seq2seq_lm cannot pack examples; set dataset.packing: false"),
        ("dataset.overlong=split", "the task seq2seq_lm cannot split examples; choose truncate, drop or error"),
        ("dataset.train_on=all", "the task seq2seq_lm supports only answers, last_answer, not all"),
    ],
)
def test_what_a_task_lacks_is_refused_under_dataset(problem: Callable, override: str, message: str) -> None:
    found = problem("task: seq2seq_lm\n", override)
    assert (found.key, found.message) == (override.partition("=")[0], message)


def test_overrides_and_inheritance(task: Callable, write: Callable, good: str) -> None:
    assert task(BARE, "task=seq2seq_lm").task == {"type": "seq2seq_lm"}
    assert task(BARE, "task.max_length=9").dataset.max_length == 9
    assert task("task: {type: causal_lm, max_length: 8}\n", "task.max_length=9").dataset.max_length == 9
    write(name="base.yaml")
    changed = write(text="extends: base.yaml\ntask: {max_length: 7}\n")
    assert load_recipe(changed).task == {"type": "causal_lm"}
    assert load_recipe(changed).dataset.max_length == 7
    other = write(text="extends: base.yaml\ntask: {type: seq2seq_lm, max_length: 6}\n", name="other.yaml")
    assert load_recipe(other).task == {"type": "seq2seq_lm"}


def test_a_recipe_of_a_name_alone_is_written_as_before(task: Callable, write: Callable) -> None:
    recipe = task("task: {type: causal_lm, max_length: 12}\n")
    described = to_dict(recipe)
    assert described["task"] == "causal_lm"
    assert described["dataset"]["max_length"] == 12
    assert load_recipe(write(text=to_yaml(recipe))) == recipe


@pytest.mark.parametrize("given", ["causal_lm", None, {}, {"max_length": 5}, {"type": "seq2seq_lm", "max_length": 5}])
def test_the_schema_accepts_what_the_parser_does(
    schema: jsonschema.Draft202012Validator, good: str, given: Any
) -> None:
    written = yaml.safe_load(good.replace("1e-4", "0.0001"))
    schema.validate(written | {"task": given})
    schema.validate({name: value for name, value in written.items() if name != "task"})


@pytest.mark.parametrize("given", ["causal", 5, {"lenght": 5}, {"type": "seq2seq_lm", "packing": True}, {"type": "x"}])
def test_and_refuses_what_it_refuses(schema: jsonschema.Draft202012Validator, good: str, given: Any) -> None:
    assert not schema.is_valid(yaml.safe_load(good.replace("1e-4", "0.0001")) | {"task": given})


def test_settings_of_tasks_are_explained() -> None:
    assert explain("causal_lm").kind == "task"
    assert [name for name, _, _ in explain("seq2seq_lm").settings][5:8] == ["max_length", "overlong", "train_on"]
    assert explain("causal_lm.packing").default == "false"
    assert explain("task.max_length").example == "task:\n  max_length: 1024"
    assert "causal_lm" in explain("task.type").allowed
    assert json.dumps(explain("max_length").key) == '"dataset.max_length"'


def test_a_recipe_without_a_task_passes_the_check_of_a_file(write: Callable[..., Path], good: str) -> None:
    assert load_recipe(write(text=good.replace(BARE, ""))).task is None
