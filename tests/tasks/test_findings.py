"""What ``inspect`` finds in the rows of classifiers, of taggers, and of pictures with captions."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from taskkit import CASES, PREFERRED
from trainkit import scratch, write_rows

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Odd:
    """Rows in which something is to be found."""

    task: str
    """Of ``taskkit.CASES``."""
    rows: Callable[[], tuple[Rows, Rows]]
    """Makes the training and the evaluation rows."""
    finding: str
    level: str
    says: str
    """The message; ``inspect`` prints it after the finding's name."""
    lines: tuple[str, ...]
    """The file and line of each row that it names."""
    settings: dict[str, Any] | None = None
    """More of the recipe's ``task``."""
    exact: int = 0
    """Training rows that repeat an earlier one, label and all."""


def _texts(kind: str, **counts: int) -> list[dict[str, Any]]:
    return [{"text": f"{kind} {at} {label}", "label": label} for label, count in counts.items() for at in range(count)]


def _relabelled(text: str, *labels: str) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for label in labels]


def _tagged(kind: str, *tags: str) -> Rows:
    rows = [row.split() for row in tags]
    return [
        {"tokens": [f"{kind}{at}{each}" for each in range(len(row))], "ner_tags": row} for at, row in enumerate(rows)
    ]


def _picture(name: str, side: int = 32) -> str:
    path = scratch() / f"finding-{name}.png"
    Image.frombytes("RGB", (side, side), random.Random(name).randbytes(3 * side**2)).save(path)
    return str(path)


def _classes_of_pictures() -> tuple[Rows, Rows]:
    blue, red = (
        [{"image": _picture(f"{label}-{at}"), "label": label} for at in range(count)]
        for label, count in (("blue", 20), ("red", 2))
    )
    return [*blue[:19], red[0]], [blue[19], red[1]]


def _captioned(*texts: str, side: int = 32) -> tuple[Rows, Rows]:
    rows = [{"image": _picture(f"{side}-{at}", side), "text": text} for at, text in enumerate(texts)]
    return rows, [{"image": _picture("eval"), "text": "of evaluation"}]


def _judged(kind: str, *answers: str) -> Rows:
    row = {"prompt": "who?", "completion": kind, "spans": [{"start": 0, "end": 3, "label": "PER"}], "_task_hash": 1}
    return [{**row, "text": f"Ada {kind}{at}", "answer": answer} for at, answer in enumerate(answers)]


def _asked(*rows: tuple[str, str]) -> tuple[Rows, Rows]:
    """Questions about pictures, whose names stand in brackets, and their answers."""

    def row(asked: str, answer: str) -> dict[str, Any]:
        names = re.findall(r"\[(.*?)\]", asked)
        return {"prompt": re.sub(r"\[.*?\]", "<image>", asked), "completion": answer, "images": [*map(_picture, names)]}

    return [row(*each) for each in rows], [row("[eval] What?", "A tree.")]


FOUND = {
    "two answers to a question about a picture": Odd(
        "image_text_to_text",
        lambda: _asked(("[a] Who?", "Ada"), ("[b] Who?", "Kurt"), ("[a] Who?", "Emmy"), ("[a] Where?", "There")),
        "answers_differ",
        "warning",
        "2 of 4 rows have the same pictures and the same question as another row, and another answer",
        ("train.jsonl:1", "train.jsonl:3"),
    ),
    "rows without a picture": Odd(
        "image_text_to_text",
        lambda: _asked(("[a] Who?", "Ada"), ("Who?", "Kurt"), ("Who?", "Emmy")),
        "no_picture",
        "info",
        "2 of 3 rows have no picture",
        ("train.jsonl:2", "train.jsonl:3"),
    ),
    "more pictures than tokens": Odd(
        "image_text_to_text",
        lambda: _asked(("[a] Who?", "Ada"), ("[b] Who?", "Kurt"), ("[a]" * 16 + "Who?", "Emmy")),
        "pictures_too_long",
        "warning",
        "1 of 3 rows have pictures of more tokens than max_length, and are left out",
        ("train.jsonl:3",),
        {"max_length": 60},
    ),
    "pictures without a mark, and none for a mark": Odd(
        "image_text_to_text",
        lambda: (
            [{"prompt": "<image>?", "completion": "Ada", "images": [_picture("a")] * at} for at in range(3)],
            _asked()[1],
        ),
        "bad_rows",
        "error",
        "2 of 3 rows cannot be used",
        ("train.jsonl:1", "train.jsonl:3"),
    ),
    "labels that are joined in a text": Odd(
        "sequence_classification",
        lambda: (
            _texts("sun", **{"red|blue": 2, "blue|red": 1, "red": 2}),
            _texts("tea", **{"red|blue": 1, "blue|red": 1, "red": 1}),
        ),
        "joined_labels",
        "warning",
        "2 of 3 evaluation rows have a label that seems to be several ones, and is trained as one class of its own, as "
        "'red|blue' "
        "and 'blue|red'; to train several labels: task: {type: sequence_classification, label_separator: \"|\"}",
        ("eval.jsonl:1", "eval.jsonl:2"),
    ),
    "rows that Prodigy's user has not accepted": Odd(
        "token_classification",
        lambda: (_judged("sings", "accept", "reject", "ignore"), _judged("met", "accept")),
        "rows_not_accepted",
        "warning",
        "2 of 3 rows were rejected or ignored by the annotator",
        ("train.jsonl:2", "train.jsonl:3"),
    ),
    "turns in a column that is not read": Odd(
        "causal_lm",
        lambda: (
            [
                {"prompt": "who?", "completion": name, "history": turns}
                for name, turns in (
                    ("Ada", [["Hi", "Hello"]]),
                    ("Kurt", '[["Hi", "Hello"]]'),
                    ("Emmy", [{"role": "user", "content": "Hi"}]),
                    ("Sofia", []),
                    ("Marie", ["Hi", "Hello"]),
                )
            ],
            [{"prompt": "where?", "completion": "in Oslo", "history": []}],
        ),
        "turns_not_read",
        "error",
        "3 of 5 rows have turns of a conversation in a column that is not read; columns that are not read: history",
        ("train.jsonl:1", "train.jsonl:2", "train.jsonl:3"),
    ),
    "answers that are labelled as bad ones": Odd(
        "causal_lm",
        lambda: (
            [{"prompt": "who?", "completion": name, "label": name != "Ada"} for name in ("Ada", "Kurt")],
            [{"prompt": "where?", "completion": "in Oslo", "label": True}],
        ),
        "bad_answers_trained",
        "warning",
        "1 of 2 rows have a label that is false, which is not read: their answers are trained like the good ones",
        ("train.jsonl:1",),
    ),
    "texts without the chat template that there is": Odd(
        "causal_lm",
        lambda: (
            [{"prompt": text, "completion": "yes"} for text in ("old?", "<|im_start|>user\nHi<|im_end|>\n", "new?")],
            [{"prompt": "<|im_start|>user\nYo<|im_end|>\n", "completion": "no"}],
        ),
        "chat_model_without_template",
        "warning",
        "2 of 3 rows are trained without the chat template that the base model's tokenizer has",
        ("train.jsonl:1", "train.jsonl:3"),
    ),
    "one class of texts at 95 %": Odd(
        "sequence_classification",
        lambda: (_texts("sun", good=19, bad=1), _texts("tea", good=1, bad=1)),
        "unbalanced_classes",
        "warning",
        "19 of 20 rows are of one class: 'good'",
        tuple(f"train.jsonl:{line}" for line in range(1, 11)),
    ),
    "one class of pictures at 95 %": Odd(
        "image_classification",
        _classes_of_pictures,
        "unbalanced_classes",
        "warning",
        "19 of 20 rows are of one class: 'blue'",
        tuple(f"train.jsonl:{line}" for line in range(1, 11)),
    ),
    "one tag at 95 %": Odd(
        "token_classification",
        lambda: (_tagged("sun", "O " * 18, "B-PER O"), _tagged("tea", "O B-PER")),
        "unbalanced_classes",
        "warning",
        "19 of 20 words are of one class: 'O'",
        (),
    ),
    "a class of the recipe that no text has": Odd(
        "sequence_classification",
        lambda: (_texts("sun", good=3, bad=2), _texts("tea", good=1, bad=1, odd=1)),
        "missing_classes",
        "warning",
        "5 of 5 rows are of other classes than odd, which have no row",
        (),
        {"labels": ["good", "bad", "odd"]},
    ),
    "a class that evaluation lacks": Odd(
        "sequence_classification",
        lambda: (_texts("sun", good=3, bad=2, odd=1), _texts("tea", bad=2, odd=2)),
        "missing_classes",
        "warning",
        "4 of 4 evaluation rows are of other classes than good, which have no row",
        (),
    ),
    "a class that training lacks": Odd(
        "sequence_classification",
        lambda: (_texts("sun", good=3, bad=2), _texts("tea", good=1, bad=1, odd=1)),
        "bad_rows",
        "error",
        "1 of 3 evaluation rows cannot be used; the messages give the reasons",
        ("eval.jsonl:3",),
    ),
    "a tag that evaluation lacks": Odd(
        "token_classification",
        lambda: (_tagged("sun", "B-PER O", "B-LOC I-LOC"), _tagged("tea", "B-LOC O O")),
        "missing_classes",
        "warning",
        "3 of 3 evaluation words are of other classes than B-PER",
        (),
    ),
    "tags of BILOU": Odd(
        "token_classification",
        lambda: (_tagged("sun", "B-PER L-PER", "U-LOC O", "B-LOC O"), _tagged("tea", "B-PER I-PER B-LOC O")),
        "converted_tags",
        "warning",
        "2 of 3 rows have tags of BILOU, IOBES or BMES, which are turned into those of IOB2",
        ("train.jsonl:1", "train.jsonl:2"),
    ),
    "a tag that training lacks": Odd(
        "token_classification",
        lambda: (_tagged("sun", "B-PER O"), _tagged("tea", "B-PER O", "B-ORG O")),
        "bad_rows",
        "error",
        "1 of 2 evaluation rows cannot be used; the messages give the reasons",
        ("eval.jsonl:2",),
    ),
    "texts with two labels": Odd(
        "sequence_classification",
        lambda: (_texts("sun", good=3, bad=2) + _relabelled("sun 1 good", "good", "bad"), _texts("tea", good=1, bad=1)),
        "labels_differ",
        "warning",
        "3 of 7 rows have the same input as another row, and another label",
        ("train.jsonl:2", "train.jsonl:6", "train.jsonl:7"),
        exact=1,
    ),
    "a picture with two labels": Odd(
        "image_classification",
        lambda: (
            [{"image": _picture("twice"), "label": label} for label in ("blue", "red")],
            [{"image": _picture(label), "label": label} for label in ("blue", "red")],
        ),
        "labels_differ",
        "warning",
        "2 of 2 rows have the same input as another row, and another label",
        ("train.jsonl:1", "train.jsonl:2"),
    ),
    "a sentence with two series of tags": Odd(
        "token_classification",
        lambda: (
            [{"tokens": ["Ada", "met"], "ner_tags": tags} for tags in (["B-PER", "O"], ["O", "B-PER"])],
            _tagged("tea", "B-PER O"),
        ),
        "labels_differ",
        "warning",
        "2 of 2 rows have the same input as another row, and another label",
        ("train.jsonl:1", "train.jsonl:2"),
    ),
    "an answer that is good and not good": Odd(
        "preference",
        lambda: (
            [{"prompt": "who?", "completion": "Ada", "label": label} for label in (True, False)],
            [{"prompt": "where?", "completion": "in Oslo", "label": True}],
        ),
        "labels_differ",
        "warning",
        "2 of 2 rows have the same input as another row, and another label",
        ("train.jsonl:1", "train.jsonl:2"),
        {"loss": "kto"},
    ),
    "a reward that wants the same answer of every row": Odd(
        "grpo",
        lambda: (
            [{"prompt": f"who is {name}?", "answer": "nobody"} for name in ("Ada", "Kurt")],
            [{"prompt": "where?", "answer": "in Oslo"}],
        ),
        "constant_reward",
        "warning",
        "2 of 2 rows want the same answer of every row, so that a reward is constant over the data",
        ("train.jsonl:1", "train.jsonl:2"),
        {"rewards": [{"exact_match": "answer"}]},
    ),
    "pairs whose prompt is in another column": Odd(
        "preference",
        lambda: (
            [{"question": f"who is {name}?", "chosen": name, "rejected": "nobody"} for name in ("Ada", "Kurt")],
            [{"question": "where?", "chosen": "in Oslo", "rejected": "in Rome"}],
        ),
        "no_prompt",
        "error",
        "2 of 2 rows are answers without a prompt; columns that are not read: question",
        ("train.jsonl:1", "train.jsonl:2"),
    ),
    "pictures beside answers": Odd(
        "preference",
        lambda: ([{**row, "images": ["a.jpg"]} for row in PREFERRED[:2]], PREFERRED[2:4]),
        "pictures_not_read",
        "warning",
        "2 of 2 rows have a column of pictures, which the task does not read",
        ("train.jsonl:1", "train.jsonl:2"),
    ),
    "pairs that may contradict one another": Odd(
        "feature_extraction",
        lambda: (
            [{"anchor": f"{name} sings", "positive": f"{name} is quiet", "label": 2} for name in ("Ada", "Kurt")],
            [{"anchor": "a sun", "positive": "a moon"}],
        ),
        "pairs_with_label",
        "warning",
        "2 of 2 rows have a label or score, which is not read",
        ("train.jsonl:1", "train.jsonl:2"),
    ),
    "a document that is right and wrong": Odd(
        "reranker",
        lambda: (
            [
                {"query": "a sun", "positive": "a tea", "negative": ["a moon", "a tea"]},
                {"query": "a moon", "positive": "a mill", "negative": ["a stone"]},
            ],
            [{"query": "a mill", "positive": "a sun", "negative": ["a tea"]}],
        ),
        "positive_is_negative",
        "warning",
        "1 of 2 rows have a positive that is also one of their negatives",
        ("train.jsonl:1",),
    ),
    "rows that contradict one another about a document": Odd(
        "reranker",
        lambda: (
            [
                {"query": "a sun", "positive": "a tea", "negative": ["a moon"]},
                {"query": "a sun", "positive": "a mill", "negative": ["a tea", "a stone"]},
                {"query": "a moon", "positive": "a tea", "negative": ["a mill"]},
            ],
            [{"query": "a mill", "positive": "a sun", "negative": ["a tea"]}],
        ),
        "documents_contradict",
        "warning",
        "2 of 3 rows have a document that is a positive of the query in one row and a negative of it in another",
        ("train.jsonl:1", "train.jsonl:2"),
    ),
    "a pair with two scores": Odd(
        "feature_extraction",
        lambda: (
            [{"sentence1": "a cat", "sentence2": "a dog", "score": score} for score in (0.9, 0.1, 0.1)],
            [{"sentence1": "a sun", "sentence2": "a moon", "score": 0.5}],
        ),
        "labels_differ",
        "warning",
        "3 of 3 rows have the same input as another row, and another label",
        ("train.jsonl:1", "train.jsonl:2", "train.jsonl:3"),
        {"loss": "cosine"},
        exact=1,
    ),
    "a question with two answers": Odd(
        "question_answering",
        lambda: (
            [
                {"question": "who?", "context": "Ada met Kurt", "answers": {"text": [text], "answer_start": [start]}}
                for text, start in (("Ada", 0), ("Kurt", 8))
            ],
            [{"question": "where?", "context": "in Oslo", "answers": {"text": ["Oslo"], "answer_start": [3]}}],
        ),
        "labels_differ",
        "warning",
        "2 of 2 rows have the same input as another row, and another label",
        ("train.jsonl:1", "train.jsonl:2"),
    ),
    "small pictures": Odd(
        "text_to_image",
        lambda: _captioned("a red dog", "a blue cat", side=31),
        "small_pictures",
        "warning",
        "2 of 2 rows are pictures smaller than the resolution, which are enlarged: what is made will be as blurred",
        ("train.jsonl:1", "train.jsonl:2"),
    ),
    "one of two pictures without a caption": Odd(
        "text_to_image",
        lambda: _captioned("a red dog", " "),
        "no_caption",
        "warning",
        "1 of 2 rows have no caption, and are trained without a prompt",
        ("train.jsonl:2",),
    ),
    "most pictures without a caption": Odd(
        "text_to_image",
        lambda: _captioned("a red dog", "", ""),
        "no_caption",
        "error",
        "2 of 3 rows have no caption, and are trained without a prompt",
        ("train.jsonl:2", "train.jsonl:3"),
    ),
}


def _slow(odd: Odd) -> Sequence[pytest.MarkDecorator]:
    """A process takes seconds to import diffusers."""
    return [pytest.mark.slow] if CASES[odd.task].slow else []


@pytest.mark.grid(each=lambda name: FOUND[name].finding)
@pytest.mark.parametrize("name", [pytest.param(name, marks=_slow(odd)) for name, odd in FOUND.items()])
def test_inspect_finds_it_and_names_its_rows(cli: Callable, tmp_path: Path, name: str) -> None:
    odd = FOUND[name]
    recipe = CASES[odd.task].write(tmp_path)
    for split, rows in zip(("train", "eval"), odd.rows(), strict=True):
        write_rows(tmp_path / f"{split}.jsonl", rows)
    settings = [f"task.{key}={value}" for key, value in (odd.settings or {}).items()]
    code = 3 if odd.level == "error" else 0
    answer = cli("inspect", recipe, *settings, "--json", code=code)
    findings = {each["name"]: each for each in answer["findings"]}
    found = findings[odd.finding]
    assert found["level"] == odd.level
    assert found["rows"] == [f"{tmp_path}/{line}" for line in odd.lines]
    assert f"{odd.finding}: {odd.says}" in cli("inspect", recipe, *settings, code=code)
    also = {"exact_duplicates", "chat_model_without_template"} - {odd.finding}
    loud = {each["name"] for each in findings.values() if each["level"] != "info"} - also
    assert loud == {odd.finding} - {each["name"] for each in findings.values() if each["level"] == "info"}
    assert code or answer["audit"]["train"]["duplicates"]["exact"] == odd.exact
