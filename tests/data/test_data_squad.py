"""SQuAD's nested JSON: its forms, and what is wrong with it.

That it gives the examples of flat rows is in ``tests/tasks/test_question_answering.py``.
"""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from peftcli.data import readers, text_rows
from peftcli.data.readers import read_file
from peftcli.data.rows import Place, Row
from peftcli.errors import DataError

pytestmark = pytest.mark.slow

TURIN = {
    "context": "Ada lives in Turin.\nShe has a cat, Émile.",
    "qas": [
        {"id": "q1", "question": "Where?", "answers": [{"text": "Turin", "answer_start": 13}], "is_impossible": False},
        {
            "id": "q2",
            "question": "Who sang?",
            "answers": [],
            "plausible_answers": [{"text": "Ada", "answer_start": 0}],
            "is_impossible": True,
        },
    ],
}
OSLO = {
    "context": "It is in Oslo.",
    "qas": [{"id": "q3", "question": "In?", "answers": [{"text": "Oslo", "answer_start": 9}] * 3}],
}
FILE: dict[str, Any] = {
    "version": "v2.0",
    "data": [{"title": "Ada", "paragraphs": [TURIN, OSLO]}, {"paragraphs": [OSLO], "title": "Oslo"}],
}
ROWS = [
    {
        "id": "q1",
        "title": "Ada",
        "question": "Where?",
        "context": TURIN["context"],
        "answers": {"text": ["Turin"], "answer_start": [13]},
    },
    {
        "id": "q2",
        "title": "Ada",
        "question": "Who sang?",
        "context": TURIN["context"],
        "answers": {"text": [], "answer_start": []},
    },
    *(
        {
            "id": "q3",
            "title": title,
            "question": "In?",
            "context": OSLO["context"],
            "answers": {"text": ["Oslo"] * 3, "answer_start": [9] * 3},
        }
        for title in ("Ada", "Oslo")
    ),
]
WRITTEN: dict[str, str] = {
    "on one line": json.dumps(FILE),
    "over many lines": "\ufeff\n" + json.dumps(FILE, indent=2, ensure_ascii=False) + "\n\n",
    "the articles first": json.dumps({"data": FILE["data"], "version": "1.1", "more": [{"data": []}]}),
}


def read(folder: Path, content: str | bytes, name: str = "a.json") -> list[Row | DataError]:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_file(path, name))


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("form", WRITTEN)
def test_questions_are_rows_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, packed: str, chunk: int
) -> None:
    monkeypatch.setattr(text_rows, "CHUNK", chunk)
    text = WRITTEN[form].encode()
    rows = read(tmp_path, gzip.compress(text) if packed else text, f"a.json{packed}")
    assert rows == [Row(values, Place(f"a.json{packed}", number)) for number, values in enumerate(ROWS, start=1)]


def test_what_is_not_given_is_no_column(tmp_path: Path) -> None:
    bare = {"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q"}, {"question": "r", "answers": []}]}]}]}
    first, second = read(tmp_path, json.dumps(bare))
    assert isinstance(first, Row)
    assert first.values == {"question": "q", "context": "c"}
    assert isinstance(second, Row)
    assert second.values["answers"] == {"text": [], "answer_start": []}


def test_objects_with_other_lists_stay_one_row_a_line(tmp_path: Path) -> None:
    text = '{"data": [{"a": 1}]}\n{"data": [{"paragraphs": []}]}\n'
    assert [row.values for row in read(tmp_path, text.splitlines()[0]) if isinstance(row, Row)] == [
        {"data": [{"a": 1}]}
    ]
    assert len(read(tmp_path, text, "a.jsonl")) == 2


def without(part: dict[str, Any], name: str) -> None:
    del part[name]


Change = Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], object]
"""Damages an article, a paragraph of it, or a question of that."""
BAD: dict[str, tuple[Change, str, str, int]] = {
    "no paragraphs": (lambda a, p, q: without(a, "paragraphs"), "paragraphs", "missing", 1),
    "a paragraph that is a text": (
        lambda a, p, q: a["paragraphs"].insert(0, "x"),
        "paragraphs[0]",
        "expected an object, found a string",
        4,
    ),
    "no context": (lambda a, p, q: without(p, "context"), "paragraphs[0].context", "missing", 2),
    "one question": (lambda a, p, q: p.update(qas=q), "paragraphs[0].qas", "expected a list, found an object", 2),
    "no question": (
        lambda a, p, q: without(q, "question"),
        "paragraphs[0].qas[0].question",
        "missing (question 'q1')",
        3,
    ),
    "null answers": (
        lambda a, p, q: q.update(answers=None),
        "paragraphs[0].qas[0].answers",
        "expected a list, found null (question 'q1')",
        3,
    ),
    "no answer_start": (
        lambda a, p, q: without(q["answers"][0], "answer_start"),
        "paragraphs[0].qas[0].answers[0].answer_start",
        "missing",
        3,
    ),
    "a place that is a truth value": (
        lambda a, p, q: q["answers"][0].update(answer_start=True),
        "paragraphs[0].qas[0].answers[0].answer_start",
        "expected a whole number, found a truth value",
        3,
    ),
    "an answer that should not be": (
        lambda a, p, q: q.update(is_impossible=True),
        "paragraphs[0].qas[0]",
        "has answers, although is_impossible is true",
        3,
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_malformed_is_one_error_with_its_place(tmp_path: Path, case: str) -> None:
    change, key, message, good = BAD[case]
    content = deepcopy(FILE)
    article = content["data"][0]
    change(article, article["paragraphs"][0], article["paragraphs"][0]["qas"][0])
    found = read(tmp_path, json.dumps(content))
    [error] = [each for each in found if isinstance(each, DataError)]
    assert (error.file, error.key, message) == ("a.json", f"data[0].{key}", error.message)
    assert len(found) == good + 1
    assert [each.place.number for each in found if isinstance(each, Row)][-1] == len(found)


TEXT = json.dumps(FILE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT[:-5], "is not JSON"),
        (TEXT + "\n" + TEXT, "text after the end of the object"),
        (TEXT[:-1] + ", }", "a comma before the closing '}'"),
        (TEXT[:-1] + ', "data": [{}]}', "the key 'data' occurs twice"),
        (TEXT[:-1] + ', "more" 1}', "expected a name and ':'"),
        (TEXT.replace('"q2"', '"q2", "id": "q2"'), "the key 'id' occurs twice in one object"),
        (TEXT.replace('"data": [', '"data": [' + '{"paragraphs":' + "[" * 100_000), "nested too deeply"),
        (TEXT.encode().replace(b"Turin.", b"\xff"), "is not UTF-8: byte 0xff"),
    ],
)
def test_json_that_is_damaged(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    errors = []
    try:
        errors += [each for each in read_file(path, "a.json") if isinstance(each, DataError)]
    except DataError as error:
        errors.append(error)
    [error] = errors
    assert message in error.message
    assert error.file == "a.json"
    assert str(error).replace("\n", "").isprintable()


def test_memory_holds_a_few_articles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (text_rows, readers):
        monkeypatch.setattr(module, "CHUNK", 1 << 16)
    article = {"title": "t", "paragraphs": [{"context": "x" * 10_000, "qas": OSLO["qas"]}]}
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"data": [article] * 1_000}).encode(), 1))  # 10 MB
    tracemalloc.start()
    try:
        assert sum(isinstance(each, Row) for each in read_file(path, "a")) == 1_000
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_an_article_that_is_too_long_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "MAX_ROW", 1000)
    monkeypatch.setattr(text_rows, "CHUNK", 1000)
    content = {"data": [{"paragraphs": [{"context": "x" * 9_000, "qas": []}]}]}
    with pytest.raises(DataError, match="a row of more than"):
        read(tmp_path, json.dumps(content))
