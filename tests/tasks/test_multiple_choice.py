"""Multiple choice: any number of choices, each scored by itself, and what rows may look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifierkit import table_of
from maskedkit import TEXTS, choice_rows, masked_base
from trainkit import run_recipe, write_rows

from peftcli.cli.app import main
from peftcli.errors import AdapterError, DataError
from peftcli.models.open import open_base
from peftcli.recipe import load_recipe
from peftcli.schema import BaseModel
from peftcli.tasks import TASKS
from peftcli.tasks.base import PredictOptions, model_inputs

KINDS = ("bert", "roberta", "modernbert")
QUESTION = {"question": "the sun?", "choices": ["warms", "breaks us", "follows"], "label": 1}


def open_task(kind: str = "bert", **settings: Any) -> Any:
    row = TASKS["multiple_choice"]
    return row.open(row.settings(**settings), open_base(BaseModel(name=str(masked_base(kind)))))


def model_of(task: Any) -> Any:
    torch.manual_seed(0)
    return task.base.model("AutoModelForMultipleChoice", torch.float32).model.eval()


def encoded(task: Any, *rows: dict[str, Any]) -> list[Any]:
    table, those = table_of(rows)
    return list(task.encode(those, task.read(table)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_transformers_row_by_row(kind: str) -> None:
    task, rows = open_task(kind), choice_rows()
    model, examples = model_of(task), [outcome.examples[0] for outcome in encoded(task, *rows)]
    assert {len(each.arrays["sizes"]) for each in examples} == {2, 3}
    found = task.loss(model, task.collate(examples, training=True))
    wanted, right = 0.0, 0
    for row in rows:
        pairs = task.processor(
            [row["question"]] * len(row["choices"]), row["choices"], padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            inputs = {name: each[None] for name, each in pairs.items() if kind != "roberta" or name != "token_type_ids"}
            outputs = model(**inputs, labels=torch.tensor([row["label"]]))
        wanted += float(outputs.loss)
        right += int(outputs.logits[0].argmax()) == row["label"]
    assert float(found.total.detach()) == pytest.approx(wanted, rel=1e-4)
    assert int(found.sums["correct"]) == right


def test_answers_do_not_depend_on_the_batch_nor_on_the_order_of_choices() -> None:
    task, rows = open_task(), choice_rows()
    model = model_of(task)
    alone, together = (list(task.predict(model, table_of(rows)[1], PredictOptions(batch_size=size))) for size in (1, 5))
    turned = [{**row, "choices": row["choices"][::-1]} for row in rows]
    other = list(task.predict(model, table_of(turned)[1], PredictOptions()))
    for row, one, two, three in zip(rows, alone, together, other, strict=True):
        assert one["scores"] == pytest.approx(two["scores"], abs=1e-5)
        assert one["scores"] == pytest.approx(three["scores"][::-1], abs=1e-5)
        assert one["text"] == row["choices"][one["choice"]] == three["text"]
        assert sum(one["scores"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"label": 2}, 2),
        ({"label": "2"}, 2),
        ({"label": "follows"}, 2),
        ({"label": "B"}, 1),
        ({"choices": ["1", "2", "3"], "label": "2"}, 1),
        ({"choices": ["1", "2", "3"], "label": 2}, 2),
        ({"choices": {"text": ["warms", "breaks"], "label": ["1", "2"]}, "label": "2"}, 1),
        ({"choices": '["warms", "breaks"]', "label": 1}, 1),
        ({"choices": "['warms', 'breaks']", "label": "1.0"}, 1),
    ],
)
def test_what_a_label_may_be(values: dict[str, Any], place: int) -> None:
    (outcome,) = encoded(open_task(), QUESTION | values)
    assert int(outcome.examples[0].arrays["label"]) == place


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"label": 3}, "expected a place from 0 to 2"),
        ({"label": -1}, "expected a place"),
        ({"label": True}, "expected a place"),
        ({"label": None}, "expected a place"),
        ({"label": "moon"}, "found 'moon'"),
        ({"choices": ["warms"]}, "two or more"),
        ({"choices": ["warms", " "]}, "expected a list of texts"),
        ({"choices": "warms"}, "expected a list of texts"),
        ({"question": " "}, "expected a text"),
    ],
)
def test_rows_that_are_errors(values: dict[str, Any], said: str) -> None:
    (outcome,) = encoded(open_task(), QUESTION | values)
    assert isinstance(outcome, DataError)
    assert said in outcome.message


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_long_context_the_end_is_cut_and_the_question_stays(kind: str) -> None:
    task = open_task(kind, max_length=24)
    (outcome,) = encoded(task, {**QUESTION, "question": "a stone breaks", "context": " ".join(TEXTS)})
    sizes = np.asarray(outcome.examples[0].arrays["sizes"])
    assert (outcome.flags, sizes.max() <= 24, sizes.max() > 20) == (1, True, True)
    first = task.processor.decode(np.asarray(outcome.examples[0].arrays["input_ids"])[: sizes[0]].tolist())
    assert "a stone breaks" in first
    assert TEXTS[0][:8] in first


def test_a_choice_that_stands_twice_is_a_finding_and_soft_prompts_are_refused(tmp_path: Path, capsys: Any) -> None:
    rows = [*choice_rows(), {**QUESTION, "choices": ["warms", "us", "warms"]}]
    data, recipe = write_rows(tmp_path / "train.jsonl", rows), tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base_model: {masked_base('bert')}\ntask: multiple_choice\nmethod: {{type: lora, target_modules: [query]}}\n"
        f"dataset: {{train: {data}}}\ntraining: {{output_dir: {tmp_path}/out, max_steps: 1}}\n"
    )
    assert main(["inspect", str(recipe)]) == 0
    assert "a choice that stands twice" in capsys.readouterr().out
    with pytest.raises(AdapterError, match="compares several texts"):
        run_recipe(recipe, "method={type: prompt_tuning, num_virtual_tokens: 4}")


def test_init_and_recipes_without_a_task_find_it(tmp_path: Path, capsys: Any) -> None:
    rows, recipe = write_rows(tmp_path / "train.jsonl", choice_rows() * 2), tmp_path / "recipe.yaml"
    command = ["init", str(rows), "--base", str(masked_base("bert")), "--output", str(recipe)]
    assert main(command) == 0, capsys.readouterr().err
    assert load_recipe(recipe).task == {"type": "multiple_choice"}
    assert "multiple_choice" in recipe.read_text()
    batch = open_task().collate(encoded(open_task(), QUESTION)[0].examples, training=False)
    assert {each.ndim for each in model_inputs(batch).values()} == {3}
