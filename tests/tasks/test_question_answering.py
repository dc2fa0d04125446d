"""Question answering: windows and places, answers that are elsewhere or missing, SQuAD's metrics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifierkit import encoded, head_model, open_task, scanned, table_of
from taskkit import CASES
from tokenizers.normalizers import BertNormalizer, Replace
from tokenizers.processors import TemplateProcessing
from trainkit import write_rows

from peftcli.data.rows import Row, Table
from peftcli.data.sources import open_source
from peftcli.errors import DataError
from peftcli.schema import Source
from peftcli.tasks.base import PredictOptions
from peftcli.tasks.question_answering import score_of

NAME = "question_answering"
ROW = {
    "question": "  Where does Ada live?",
    "context": "Ada lives in Turin with a cat.",
    "answers": {"text": ["Turin", "in Turin"], "answer_start": [13, 10]},
}
NONE = {**ROW, "question": "Where does Alan live?", "answers": {"text": [], "answer_start": []}}
LONG = {
    "question": "Where is it?",
    "context": "the sun is over the mill. " * 12 + "It is in Oslo. " + "the tea is cold. " * 12,
    "answers": {"text": ["Oslo"], "answer_start": [26 * 12 + 9]},
}
KINDS = ["bert", "gpt2"]


def text_at(task: Any, example: Any) -> str:
    """The part of the context that an example's target is."""
    first, last = example.arrays["answer"]
    places = example.arrays["places"]
    return str(example.arrays["context"][places[first][0] : places[last][1]]).strip()


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_the_first_answer(kind: str) -> None:
    task = open_task(NAME, kind, unanswerable=False)
    [example] = encoded(task, [ROW])
    assert text_at(task, example) == "Turin"
    assert list(example.arrays["input_ids"]) == task.processor(ROW["question"].lstrip(), ROW["context"])["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_context_becomes_windows_that_overlap(kind: str) -> None:
    task = open_task(NAME, kind, max_length=48, stride=12, unanswerable=False)
    table, rows = table_of([LONG])
    [outcome] = task.encode(rows, task.read(table))
    assert len(outcome.examples) > 3
    assert all(each.size <= 48 for each in outcome.examples)
    covered = np.zeros(len(LONG["context"]), int)
    for each in outcome.examples:
        for start, end in each.arrays["places"]:
            covered[max(start, 0) : end] += start >= 0
    inked = [at for at, mark in enumerate(LONG["context"]) if not mark.isspace()]
    assert covered[inked].min() >= 1
    assert covered.max() == 2
    texts = [text_at(task, each) for each in outcome.examples if each.arrays["answer"][0] != task._none(each)]
    assert texts
    assert set(texts) == {"Oslo"}


@pytest.mark.parametrize("answers", ["Turin", ["Turin"], {"text": ["Turin"]}, {"text": "Turin"}])
def test_an_answer_without_its_place_is_looked_up(answers: Any) -> None:
    task = open_task(NAME, "bert")
    rows = [{**ROW, "answers": answers}, {**ROW, "answers": answers, "context": "Turin! Ada lives in Turin."}]
    table, found = table_of(rows)
    first, several = task.encode(found, task.read(table))
    assert text_at(task, first.examples[0]).lower() == "turin"
    assert (first.flags, several.flags) == (0, task.findings_of_flags["several_places"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text", "start"), [(" Turin", 12), ("Turin ", 13), (" ", 12)])
def test_blanks_around_an_answer_are_no_part_of_it(text: str, start: int, kind: str) -> None:
    """They belong to no token, so that no window would hold the answer."""
    task = open_task(NAME, kind, unanswerable=True)
    [example] = encoded(task, [{**ROW, "answers": {"text": [text], "answer_start": [start]}}])
    wanted = encoded(task, [ROW if text.strip() else NONE])[0]
    assert list(example.arrays["answer"]) == list(wanted.arrays["answer"])
    assert json.loads(example.arrays["answers"]) == [text.strip()] * bool(text.strip())


def test_characters_that_the_tokenizer_drops_may_be_around_an_answer() -> None:
    task = open_task(NAME, unanswerable=False)
    task.processor.backend_tokenizer.normalizer = Replace("\u200b", "")
    answer = "\u200bTurin\u200b"
    row = {**ROW, "context": f"Ada lives in {answer} now", "answers": {"text": [answer], "answer_start": [13]}}
    [example] = encoded(task, [row])
    assert text_at(task, example) == "Turin"


def test_an_answer_that_is_missing_is_the_class_token() -> None:
    task = open_task(NAME, unanswerable=True)
    [example] = encoded(task, [NONE])
    assert list(example.arrays["answer"]) == [0, 0]
    assert example.arrays["input_ids"][0] == (task.processor.cls_token_id or example.arrays["input_ids"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"answers": {"text": ["Turin"], "answer_start": [12]}},
            "'Turin' is not at character 12 of the context: ' Turi' is",
        ),
        ({"answers": {"text": ["Turin"], "answer_start": [99]}}, "is not at character 99"),
        ({"answers": {"text": ["Turin"], "answer_start": []}}, "expected an answer_start for each text"),
        ({"answers": [7]}, "expected text and answer_start, found 7"),
        ({"answers": "Paris"}, "the answer 'Paris' is not in the context"),
        ({"answers": []}, "has no answer; task.unanswerable is false"),
        ({"question": " "}, "expected a text"),
        ({"question": "Where? " * 30}, "the question leaves 0 of 64 tokens for the context"),
        (
            {"context": "sun tea " * 60, "answers": {"text": ["sun tea " * 60], "answer_start": [0]}},
            "no window of 64 tokens holds all of the answer 'sun tea",
        ),
    ],
)
def test_rows_that_cannot_be_used(change: dict[str, Any], message: str) -> None:
    [bad] = encoded(open_task(NAME, unanswerable=False, stride=16), [{**ROW, **change}])
    assert isinstance(bad, DataError)
    assert message in bad.message


@pytest.mark.parametrize("length", [6, 12, 24, 48])
def test_a_window_is_no_larger_than_max_length_or_the_row_an_error(length: int) -> None:
    """The tokenizer counts for itself, and panics where it has less room than it was told."""
    task = open_task(NAME, max_length=length, stride=64, unanswerable=False)
    around: dict[str, Any] = {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B [SEP]"}
    special = [("[CLS]", 1), ("[SEP]", 2)]
    task.processor.backend_tokenizer.post_processor = TemplateProcessing(**around, special_tokens=special)
    [found] = encoded(task, [LONG])
    assert isinstance(found, DataError)
    assert "tokens for the context" in found.message


def test_whether_answers_may_be_missing_is_found() -> None:
    assert scanned([ROW, NONE], NAME).settings.unanswerable is True
    assert scanned([ROW], NAME).settings.unanswerable is False


def squad(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """SQuAD's own JSON of rows: an article each, which has the row's question twice."""
    articles = []
    for number, row in enumerate(rows):
        answers = [
            {"text": text, "answer_start": start}
            for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        ]
        question = {"question": row["question"], "answers": answers, "is_impossible": not answers}
        if not answers:
            question["plausible_answers"] = [{"text": "Turin", "answer_start": 13}]
        qas = [{**question, "id": f"{number}-{n}"} for n in range(2)]
        articles.append({"title": "Ada", "paragraphs": [{"context": row["context"], "qas": qas}]})
    return {"version": "v2.0", "data": articles}


def test_nested_json_gives_the_examples_of_flat_rows(tmp_path: Path) -> None:
    rows = [ROW, NONE, LONG]
    flat = write_rows(tmp_path / "flat.jsonl", [row for row in rows for _ in range(2)])
    nested = tmp_path / "nested.json"
    nested.write_text(json.dumps(squad(rows)))
    task = open_task(NAME, max_length=48, stride=12, unanswerable=True)
    made = []
    for path, columns in (
        (flat, ("question", "context", "answers")),
        (nested, ("id", "title", "answers", "context", "question")),
    ):
        read = [row for row in open_source(Source(train=str(path))).rows() if isinstance(row, Row)]
        table = Table(Source(train=str(path)), path.name, columns)
        outcomes = task.encode(read, task.read(table))
        made.append([[{**each.arrays, "row": ""} for each in outcome.examples] for outcome in outcomes])
        ids = {each.arrays["row"] for outcome in outcomes for each in outcome.examples}
        assert len(ids) == 6  # the windows of a question, and of no other, are measured together
    assert made[0] == made[1]
    assert len(made[1]) == 6


def test_rows_of_one_line_are_measured_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROW, NONE]))
    task = open_task(NAME, unanswerable=True)
    read = [row for row in open_source(Source(train=str(path))).rows() if isinstance(row, Row)]
    outcomes = task.encode(read, task.read(table_of([ROW])[0]))
    assert len({each.arrays["row"] for outcome in outcomes for each in outcome.examples}) == 2


def test_questions_of_two_columns_are_measured_one_by_one() -> None:
    task = open_task(NAME, max_length=40, stride=8, unanswerable=True)
    tables = [table_of([{**LONG, "question": question}]) for question in ("Where is Oslo?", "Where is Rome?")]
    outcomes = [outcome for table, rows in tables for outcome in task.encode(rows, task.read(table))]
    windows = [example for outcome in outcomes for example in outcome.examples]
    assert len({each.arrays["row"] for each in windows}) == 1  # each is row 1 of its source
    with torch.no_grad():
        outputs = task.loss(head_model(task), task.collate(windows, training=False)).outputs
    assert len(outputs) > len({question for question, *_ in outputs}) == 2


@pytest.mark.slow
def test_every_command_reads_nested_json(tmp_path: Path, cli: Any) -> None:
    CASES[NAME].write(tmp_path)
    rows, nested, flat = CASES[NAME].rows(), tmp_path / "nested.json", tmp_path / "flat.jsonl"
    nested.write_text(json.dumps(squad(rows)))
    write_rows(flat, [row for row in rows for _ in range(2)])
    results = []
    for path in (nested, flat):
        recipe, folder = path.with_suffix(".yaml"), path.with_suffix("")
        data = f"dataset: {{train: {path}, eval: {path}}}"
        recipe.write_text(f"extends: recipe.yaml\n{data}\ntraining: {{output_dir: {folder}}}\n")
        cli("check", "--deep", recipe)
        audit = cli("inspect", recipe, "--json")["audit"]
        cli("train", recipe)
        measured = cli("evaluate", recipe, "--adapter", folder, "--json")["eval"]["last"]
        results.append((audit["train"]["lengths"], measured, (folder / "adapter_model.safetensors").read_bytes()))
    assert results[0] == results[1]
    asked = squad(rows)
    for article in asked["data"]:
        for question in article["paragraphs"][0]["qas"]:
            del question["answers"], question["is_impossible"]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    for path in (tmp_path / "asked.json", flat):
        cli("predict", tmp_path / "nested", "--input", path, "--output", path.with_suffix(".out"))
    assert (tmp_path / "asked.out").read_text() == (tmp_path / "flat.out").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_a_place_in_the_context(kind: str) -> None:
    task = open_task(NAME, kind, max_length=40, stride=8, unanswerable=False)
    _, rows = table_of([LONG])
    [found] = task.predict(head_model(task), rows, PredictOptions())
    assert found["answer"] == LONG["context"][found["start"] : found["end"]]
    assert found["answer"]


@pytest.mark.parametrize("threshold", [-1e6, 1e6])
def test_the_threshold_of_no_answer(threshold: float) -> None:
    task = open_task(NAME, unanswerable=True, null_threshold=threshold)
    _, rows = table_of([ROW])
    [found] = task.predict(head_model(task), rows, PredictOptions())
    assert bool(found["answer"]) == (threshold > 0)


@pytest.mark.parametrize("right", [True, False])
def test_a_perfect_and_a_wrong_predictor(right: bool) -> None:
    task = open_task(NAME, max_length=40, stride=8, unanswerable=True)
    rows = [ROW, NONE, LONG]
    table, read = table_of(rows)
    examples = [each for outcome in task.encode(read, task.read(table)) for each in outcome.examples]
    outputs = []
    for each in examples:
        scores = torch.zeros(len(each.arrays["input_ids"]), 2)
        first, last = each.arrays["answer"] if right else (0, 0)
        scores[first, 0] = scores[last, 1] = 9
        outputs += task._outputs(scores[None], [each])
    metrics = task.metrics({"loss": np.array(1.0)}, outputs, len(examples))
    assert (metrics["exact_match"], metrics["f1"]) == pytest.approx((1, 1) if right else (1 / 3, 1 / 3))


def test_an_answer_ends_with_the_accents_that_the_tokenizer_strips() -> None:
    task = open_task(NAME, unanswerable=False)
    task.processor.backend_tokenizer.normalizer = BertNormalizer(strip_accents=True)
    answer = "Rene\u0301"
    row = {**ROW, "context": f"Ada lives with {answer} now", "answers": {"text": [answer], "answer_start": [15]}}
    [example] = encoded(task, [row])
    scores = torch.zeros(len(example.arrays["input_ids"]), 2)
    for side, at in enumerate(example.arrays["answer"]):
        scores[at, side] = 9
    assert task._answer(row["context"], [task._likeliest(example, scores)])["answer"] == answer


WORDS = ["tea", "sun", "seven", "mill", "river", "fox", "red", "old", "follows", "1"]
"""Each is one token of the tiny tokenizer."""


@pytest.mark.grid
@pytest.mark.parametrize(
    ("answer", "expected"),
    [("sun", (1 / 11, 1 / 11)), ("sun seven", (0, 2 / 11 * 2 / 3)), ("", (1 / 11, 1 / 11))],
    ids=["a word", "two words", "no answer"],
)
def test_a_random_predictor(answer: str, expected: tuple[float, float]) -> None:
    """One of ten words, or that the answer is not there."""
    task = open_task(NAME, unanswerable=True, max_answer_length=1)
    context, texts = " ".join(WORDS), [answer] if answer else []
    answers = {"text": texts, "answer_start": [context.index(each) for each in texts]}
    rows = [{"question": f"what {number}?", "context": context, "answers": answers} for number in range(1000)]
    examples = encoded(task, rows)
    assert sum(start >= 0 for start, _ in examples[0].arrays["places"]) == len(WORDS)
    draw = torch.Generator().manual_seed(0)
    outputs = [
        output
        for each in examples
        for output in task._outputs(torch.randn(1, len(each.arrays["input_ids"]), 2, generator=draw), [each])
    ]
    metrics = task.metrics({"loss": np.array(1.0)}, outputs, len(examples))
    assert (metrics["exact_match"], metrics["f1"]) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("The Turin.", ["turin"], (1.0, 1.0)),
        ("in Turin", ["Turin", "Oslo"], (0.0, 2 / 3)),
        ("", ["Turin"], (0.0, 0.0)),
        ("", [], (1.0, 1.0)),
        ("Turin", [], (0.0, 0.0)),
        ("a b b", ["b b c"], (0.0, 0.8)),
    ],
)
def test_scores_of_an_answer(answer: str, right: list[str], expected: tuple[float, float]) -> None:
    assert score_of(answer, right) == pytest.approx(expected)


def test_inspect_marks_the_answer() -> None:
    task = open_task(NAME, unanswerable=True)
    shown = [task.show(each) for each in encoded(task, [ROW, NONE])]
    trained = ["".join(token.text for token in each.parts[0].tokens if token.trained) for each in shown]
    assert [text.strip() for text in trained] == ["Turin", ""]
    assert [each.parts[1].text for each in shown] == ["Turin", "(not in this context)"]
