"""Read SQuAD's own JSON (arXiv:1606.05250; with questions that have no answer, arXiv:1806.03822).

A file is ``{"version": ..., "data": [article, ...]}``. An article is ``{"title", "paragraphs": [{"context", "qas":
[{"id", "question", "answers": [{"text", "answer_start"}], "is_impossible"}]}]}``. Each question becomes a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from peftcli.data.rows import Place, Row
from peftcli.data.text_rows import JsonStream, TextFile, json_kind
from peftcli.errors import DataError

_START = re.compile(rb'\{\s*(?:"[^"\\]*"\s*:\s*(?:"[^"\\]*"|[\w.+-]+)\s*,\s*)*"data"\s*:\s*\[\s*\{')
"""Texts and numbers, such as the version, may come before the articles."""


def is_squad(head: bytes) -> bool:
    """Return whether a file that begins with ``head`` is SQuAD's JSON, and not one object per line."""
    return _START.match(head) is not None and b'"paragraphs"' in head


def read_squad(text: TextFile) -> Iterator[Row | DataError]:
    """Yield a row for each question, in order; for an article, paragraph or question that is malformed, an error.

    A row has ``id``, ``title``, ``question``, ``context`` and ``answers`` (``{"text": [...], "answer_start": [...]}``),
    without those of ``id``, ``title`` and ``answers`` that the file does not give. One article is in memory at a time.
    """
    for number, (article, fault) in enumerate(JsonStream(text).member("data")):
        key = f"data[{number}]"
        if fault:
            article = DataError(fault, file=text.source, line=text.line, key=key)
        for values in _questions(article, key, text.source):
            text.number += 1
            yield values if isinstance(values, DataError) else Row(values, Place(text.source, text.number))


def _questions(article: Any, key: str, source: str) -> Iterator[dict[str, Any] | DataError]:
    """Yield the values of the rows of an article, which may be an error itself."""
    for place, paragraph in _objects(article, "paragraphs", key, source):
        if isinstance(paragraph, dict) and not isinstance(paragraph.get("context"), str):
            paragraph = _unexpected(paragraph, "context", "a text", place, source)
        for at, question in _objects(paragraph, "qas", place, source):
            if isinstance(question, dict):
                yield _values(article, paragraph, question, at, source)
            else:
                yield question


def _objects(parent: Any, name: str, key: str, source: str) -> Iterator[tuple[str, Any]]:
    """Yield the objects of a list in ``parent``, each with its key; in place of a malformed one, the error about it.

    Where the parent is such an error, or its list is malformed, that is the only error.
    """
    if isinstance(parent, DataError):
        yield key, parent
    elif not isinstance(parent.get(name), list):
        yield key, _unexpected(parent, name, "a list", key, source)
    else:
        for number, found in enumerate(parent[name]):
            place = f"{key}.{name}[{number}]"
            if not isinstance(found, dict):
                found = DataError(f"expected an object, found {json_kind(found)}", file=source, key=place)
            yield place, found


def _values(
    article: dict[str, Any], paragraph: dict[str, Any], question: dict[str, Any], key: str, source: str
) -> dict[str, Any] | DataError:
    """Return the values of the row of a question, or the error about it."""
    if not isinstance(question.get("question"), str):
        return _unexpected(question, "question", "a text", key, source)
    try:
        answers = _answers(question, key, source)
    except DataError as error:
        return error
    values = {
        "id": question.get("id"),
        "title": article.get("title"),
        "question": question["question"],
        "context": paragraph["context"],
        "answers": answers,
    }
    return {name: value for name, value in values.items() if value is not None}


def _answers(question: dict[str, Any], key: str, source: str) -> dict[str, list[Any]] | None:
    """The answers of a question; None if the file does not give them."""
    impossible = question.get("is_impossible") is True
    if "answers" not in question and not impossible:
        return None
    found: dict[str, list[Any]] = {"text": [], "answer_start": []}
    for place, answer in _objects({"answers": [], **question}, "answers", key, source):
        if isinstance(answer, DataError):
            raise answer
        for name, kind, expected in (("text", str, "a text"), ("answer_start", int, "a whole number")):
            if type(answer.get(name)) is not kind:
                raise _unexpected(answer, name, expected, place, source)
            found[name].append(answer[name])
    if impossible and found["text"]:
        raise DataError("has answers, although is_impossible is true", file=source, key=key)
    return found


def _unexpected(parent: dict[str, Any], name: str, expected: str, key: str, source: str) -> DataError:
    problem = f"expected {expected}, found {json_kind(parent[name])}" if name in parent else "missing"
    identified = f" (question {parent['id']!r})" if isinstance(parent.get("id"), str) and len(parent["id"]) < 60 else ""
    return DataError(problem + identified, file=source, key=f"{key}.{name}")
