"""A few rows, read again from their files, and what a model answers them: for people to read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from peftcli.data.rows import Row
from peftcli.data.sources import open_source
from peftcli.data.store import Example, View
from peftcli.data.used_rows import UsedRows
from peftcli.errors import PeftcliError
from peftcli.schema import Source
from peftcli.system.secrets import redact
from peftcli.tasks.base import PredictOptions, Predicts, Task
from peftcli.tasks.shown import Label, Text
from peftcli.tasks.text.generation import GenerationSettings, TextGenerator
from peftcli.tasks.text.prompts import PromptForm, last_words, prompt_of
from peftcli.tasks.text.stop_tokens import stop_tokens

_MAX_CHARACTERS = 600
"""Of an input or an answer."""
_NEW_TOKENS = 32
_MAX_SCORES = 3


@dataclass(frozen=True)
class Examples:
    """From where rows come."""

    sources: Sequence[Source]
    columns: Mapping[str, str]
    """Names of the format -> columns that were read as them."""
    format: str | None
    """The format of the training rows."""


@dataclass(frozen=True)
class RowText:
    """A row in words."""

    row: str
    """Its place."""
    input: str
    wanted: str


def describe_rows(
    task: Task[Any], view: View, numbers: Sequence[int], examples: Examples
) -> tuple[list[Row], list[RowText]]:
    """Read used rows of a view again, by their numbers. None where one cannot be found, or the task shows none."""
    used = UsedRows(view)
    places = [used.place(at) for at in numbers]
    wanted, found = {(each.source, each.number) for each in places}, dict[tuple[str, int], Row]()
    if task.base.is_pipeline:  # a picture takes long, and is no text
        return [], []
    with suppress(PeftcliError):
        for source in examples.sources:
            for row in open_source(source).rows():
                if isinstance(row, Row) and (key := (row.place.source, row.place.number)) in wanted:
                    found.setdefault(key, row)
                if len(found) == len(wanted):
                    break
    if len(found) < len(wanted):
        return [], []
    rows = [found[each.source, each.number] for each in places]
    shown = [_shown(task, view[int(used.first[at])]) for at in numbers]
    texts = [
        RowText(str(row.place), _short(_asked(task, row, examples) or seen or _first_text(row)), _short(answer))
        for row, (seen, answer) in zip(rows, shown, strict=True)
    ]
    return rows, texts


def answers_of(model: nn.Module, task: Task[Any], rows: Sequence[Row], examples: Examples) -> list[str]:
    """Return the model's answers to rows, as texts; none where the task cannot answer them."""
    with suppress(PeftcliError), tempfile.TemporaryDirectory() as scratch:
        if isinstance(task, Predicts):
            there = {name for row in rows for name in row.values}
            columns = {name: column for name, column in examples.columns.items() if column in there}
            options = PredictOptions(batch_size=len(rows) or 1, columns=columns, beside=Path(scratch) / "answers")
            return [_short(_in_words(each)) for each in task.predict(model.eval(), rows, options)] if rows else []
        prompts = [prompt_of(row, examples.columns, examples.format) for row in rows]
        return [_short(each.text) for each in _generator(model, task, examples.format).generate(prompts, _limits(task))]
    return []


def _generator(model: Any, task: Any, format: str | None) -> TextGenerator:
    """The generator of a task whose answers are texts, as evaluation makes it."""
    form: PromptForm | None = getattr(task, "prompt_form", None)
    if form is None:  # training rows were not read
        one_way, templated = not model.config.is_encoder_decoder, bool(task.processor.chat_template)
        form = PromptForm.of_rows(format or "messages", {}, has_template=templated, decoder_only=one_way)
    return TextGenerator(model.eval(), task.processor, form, stop_tokens(task.processor, chat=form.chat))


def _limits(task: Any) -> GenerationSettings:
    new = min(_NEW_TOKENS, getattr(task.settings, "max_new_tokens", _NEW_TOKENS))
    return GenerationSettings(max_new_tokens=new)


def _asked(task: Task[Any], row: Row, examples: Examples) -> str:
    if isinstance(task, Predicts):
        return ""
    with suppress(PeftcliError):
        return last_words(prompt_of(row, examples.columns, examples.format))
    return ""


def _shown(task: Task[Any], example: Example) -> tuple[str, str]:
    """The input of an example, and what it is trained to be answered with."""
    texts, answers = list[str](), list[str]()
    for part in task.show(example).parts:
        if isinstance(part, Label):
            answers.append(part.text)
        elif isinstance(part, Text):
            texts.append("".join(token.text for token in part.tokens if not token.special))
            for token in part.tokens:
                if token.trained and not token.special:
                    answers.append(f" {token.label}:{token.text.strip()}" if token.label else token.text)
    return texts[0] if texts else "", "".join(answers).strip()


def _first_text(row: Row) -> str:
    return next((value for value in row.values.values() if isinstance(value, str)), "")


def _in_words(answer: Mapping[str, Any]) -> str:
    """An answer of ``predict`` in one line."""
    if "entities" in answer:
        return " ".join(f"{each['type']}:{each['text']}" for each in answer["entities"])
    if "label" in answer:
        return f"{answer['label']} ({answer['score']:.2f})"
    for name in ("text", "answer"):
        if name in answer:
            return str(answer[name])
    if "shares" in answer:
        shares = sorted(answer["shares"].items(), key=lambda each: -each[1])
        return ", ".join(f"{name} {share:.0%}" for name, share in shares[:_MAX_SCORES] if share)
    if "labels" in answer:
        return ", ".join(answer["labels"])
    kept = {name: round(value, 4) for name, value in answer.items() if isinstance(value, float)}
    return json.dumps(kept) if len(kept) > 1 else "".join(map(str, kept.values()))


def _short(text: str) -> str:
    text = redact(text)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..."
