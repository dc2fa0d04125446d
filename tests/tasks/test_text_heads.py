"""What every task promises whose base model reads texts and has a head: a row's answer and loss are its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from classifierkit import encoded, head_model, open_task, table_of

from peftcli.tasks.base import PredictOptions, model_inputs

TEXTS = [{"text": " ".join(["Ada sun"] * count), "label": "good"} for count in (1, 9, 3, 15, 2, 8, 5, 11)]
TAGGED = [
    {"tokens": ["Ada", "Lovelace", "lives", "in", "Turin"], "ner_tags": ["B-PER", "I-PER", "O", "O", "B-LOC"]},
    {"tokens": ["stone", "mill"], "ner_tags": ["O", "O"]},
]
ASKED = {"question": "Where does Ada live?", "context": "Ada lives in Turin with a cat."}
LONG = {"question": "Where is it?", "context": "the sun is over the mill. " * 12 + "It is in Oslo. "}
ANSWERED = [
    {**ASKED, "answers": {"text": ["Turin"], "answer_start": [13]}},
    {**ASKED, "question": "Where does Alan live?", "answers": {"text": [], "answer_start": []}},
    {**LONG, "answers": {"text": ["Oslo"], "answer_start": [26 * 12 + 9]}},
]


@dataclass(frozen=True)
class Case:
    """A task."""

    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    """Of several sizes."""
    of_one: int
    """How many of them have one example, the same ones in ``loss`` of transformers."""


CASES = {
    "sequence_classification": Case({"labels": ["good", "bad"], "problem_type": "single_label"}, TEXTS, 8),
    "token_classification": Case({"labels": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"], "scheme": "iob2"}, TAGGED, 2),
    "question_answering": Case({"max_length": 40, "stride": 8, "unanswerable": True}, ANSWERED, 2),
}
METHODS: list[dict[str, Any] | None] = [
    None,
    {"peft_type": "LORA", "target_modules": "all-linear"},
    {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5},
    {"peft_type": "P_TUNING", "num_virtual_tokens": 5},
    {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5},
]
of_tasks = pytest.mark.parametrize("name", CASES)


def near(value: Any) -> Any:
    """The value, whose numbers may be off by rounding."""
    if isinstance(value, dict):
        return {name: near(each) for name, each in value.items()}
    return pytest.approx(value, abs=1e-5) if isinstance(value, float) else value


@pytest.mark.grid(keep=8)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method and method["peft_type"].lower())
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@of_tasks
def test_a_row_has_one_answer_and_loss_in_every_batch(name: str, kind: str, method: dict[str, Any] | None) -> None:
    task, case = open_task(name, kind, **CASES[name].settings), CASES[name]
    model, rows = head_model(task, method), table_of(case.rows)[1]
    alone, together = (list(task.predict(model, rows, PredictOptions(batch_size=size))) for size in (1, 8))
    for one, other in zip(alone, together, strict=True):
        assert {key: value for key, value in one.items() if key != "entities"} == near(
            {key: value for key, value in other.items() if key != "entities"}
        )
    examples = encoded(task, case.rows[: case.of_one])
    with torch.no_grad():
        parts = [task.loss(model, task.collate([each], training=False)).total.item() for each in examples]
        whole = task.loss(model, task.collate(examples, training=False)).total.item()
    assert whole == pytest.approx(sum(parts), rel=1e-5)


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@of_tasks
def test_the_side_on_which_a_tokenizer_pads_changes_nothing(name: str, kind: str) -> None:
    found, case = [], CASES[name]
    for side in ("left", "right"):
        task = open_task(name, kind, **case.settings)
        task.processor.padding_side = side
        model, (table, rows) = head_model(task), table_of(case.rows)
        examples = [each for outcome in task.encode(rows, task.read(table)) for each in outcome.examples]
        assert len({each.size for each in examples}) > 1
        with torch.no_grad():
            loss = task.loss(model, task.collate(examples, training=False)).total.item()
        found.append((list(task.predict(model, rows, PredictOptions(batch_size=8))), loss))
    assert found[0] == found[1]


@of_tasks
def test_the_loss_is_that_of_the_model_itself(name: str) -> None:
    task, case = open_task(name, **CASES[name].settings), CASES[name]
    model, examples = head_model(task), encoded(task, case.rows[:1])
    batch = task.collate(examples, training=False)
    with torch.no_grad():
        loss, reference = task.loss(model, batch).total, model(**model_inputs(batch)).loss
    assert float(loss) / examples[0].num_targets == pytest.approx(float(reference), rel=1e-6)
