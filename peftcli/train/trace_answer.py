"""``peftcli trace``: the training rows that taught an adapter an answer, or a row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftcli.data.rows import Place, Row, Table
from peftcli.data.sources import open_source
from peftcli.data.store import Example
from peftcli.data.used_rows import UsedRows
from peftcli.errors import DataError, UsageError
from peftcli.schema import Source
from peftcli.tasks import TASKS
from peftcli.tasks.text.generation import GenerationSettings, generator_of
from peftcli.train.events import Message, OnEvent, warning
from peftcli.train.trace import By, TracedRun, influence, open_run

_ROW = re.compile(r"(.+):([0-9]{1,18})")
_CLEAR = 4.0
"""Standard deviations from the mean influence beyond which a row stands out."""
_TEXT = 400
"""Characters of a row that are reported."""


@dataclass(frozen=True)
class Question:
    """What is to be explained. One of ``prompt``, ``row`` and ``source`` is given."""

    prompt: str | None = None
    answer: str | None = None
    """What the model is taken to say to the prompt; None: what it says."""
    row: str | None = None
    """A row of a file, ``FILE:LINE``, with its label or answer."""
    source: Path | None = None
    """A file of such rows, which are explained together."""

    def check(self) -> None:
        """Raise UsageError unless it says what is to be explained."""
        if sum(each is not None for each in (self.prompt, self.row, self.source)) != 1:
            raise UsageError("give one of --prompt, --row and --input")
        if self.answer is not None and self.prompt is None:
            raise UsageError("is the answer to a --prompt", key="--answer")
        if self.row is not None and not _ROW.fullmatch(self.row):
            raise UsageError(f"{self.row!r} is not FILE:LINE", key="--row")


def rank_rows(name: str, question: Question, by: By, top: int, tell: OnEvent = lambda event: None) -> dict[str, Any]:
    """Rank the training rows of a run by their influence on an answer.

    Returns:
        What ``trace --json`` prints: ``asked``, ``by``, ``rows`` (how many were compared), ``clear`` (how many of them
        stand out), ``taught`` and ``against`` (at most ``top`` rows each, the strongest first).

    Raises:
        UsageError: the folder is not that of a finished run, or its task writes no text and a prompt is given.
        DataError: the run's rows have changed, or what is asked cannot be encoded.
    """
    question.check()
    run = open_run(name, tell)
    asked, examples = _read(run, question)
    scores = influence(run, lambda: run.sketches(examples), by)
    spread = float(scores.std()) or 1.0
    deviations = (scores - scores.mean()) / spread
    order = np.argsort(-scores, kind="stable")
    taught = [int(at) for at in order[:top] if scores[at] > 0]
    against = [int(at) for at in order[::-1][:top] if scores[at] < 0]
    if not (deviations > _CLEAR).any():
        tell(warning("no row stands out: many taught a little of this, or the base model knew it"))
    describe = partial(_describe, run, UsedRows(run.data.train), scores, deviations)
    return {
        "asked": asked,
        "by": by,
        "rows": len(scores),
        "clear": int((deviations > _CLEAR).sum()),
        "taught": list(map(describe, taught)),
        "against": list(map(describe, against)),
    }


def _describe(run: TracedRun, rows: UsedRows, scores: np.ndarray, deviations: np.ndarray, at: int) -> dict[str, Any]:
    shown = run.task.show(rows.view[int(rows.first[at])]).as_dict()
    text = " ".join(str(shown.get("text") or shown.get("image", {}).get("source", "")).split())
    return {
        "row": str(rows.place(at)),
        "influence": float(scores[at]),
        "deviations": round(float(deviations[at]), 2),
        "text": text[:_TEXT],
        "label": shown.get("label"),
    }


# --- what is asked ----------------------------------------------------------------------------------------------------


def _read(run: TracedRun, question: Question) -> tuple[dict[str, Any], list[list[Example]]]:
    """Return what is explained, as JSON, and its examples."""
    if question.prompt is not None:
        return _read_prompt(run, question.prompt, question.answer)
    file, wanted = str(question.source), None
    if question.row is not None and (found := _ROW.fullmatch(question.row)):
        file, wanted = found[1], int(found[2])
    dataset = run.recipe.dataset
    source = Source(train=file, format=dataset.format, columns=dict(dataset.columns), media_root=dataset.media_root)
    opened, rows = open_source(source), list[Row]()
    for row in opened.rows():
        number = row.line if isinstance(row, DataError) else row.place.line or row.place.number
        if wanted in (None, number):
            if isinstance(row, DataError):
                raise row
            rows.append(row)
    if not rows:
        raise UsageError(f"{file} has no row on line {wanted}" if wanted else f"{file} has no rows", key="--row")
    columns = tuple(dict.fromkeys(name for row in rows for name in row.values))
    table = Table(source, opened.name, columns, opened.class_names, rows[0].values)
    return {"rows": [str(row.place) for row in rows]}, _examples(run, table, rows)


def _read_prompt(run: TracedRun, prompt: str, answer: str | None) -> tuple[dict[str, Any], list[list[Example]]]:
    """Return a prompt with the answer to it, and their example."""
    assert run.source.task is not None
    if not TASKS[run.source.task].writes_text:
        hint = "give a row with --row FILE:LINE, or a file of rows with --input"
        raise UsageError(f"the model answers no prompts: its task is {run.source.task}", key="--prompt", hint=hint)
    generator = generator_of(run.model, run.task.processor, run.source.prompt_form, bf16=run.numbers.bf16)
    said = answer
    if said is None:
        (found,) = generator.generate([prompt], GenerationSettings(max_new_tokens=64))
        said = found.text
        if not said.strip():
            raise UsageError("the model says nothing to this prompt", key="--prompt", hint="give an --answer")
    asked = generator.form.ask(prompt)

    def encode(text: str) -> list[list[Example]]:
        values: dict[str, Any] = {"prompt": asked, "completion": text}
        if not isinstance(asked, str):
            values = {"messages": [*asked, {"role": "assistant", "content": text}]}
        row = Row(values, Place("the prompt", 1))
        return _examples(run, Table(Source(train=""), "the prompt", tuple(values), first=values), [row])

    examples = encode(said)
    if answer is not None and isinstance(asked, str) and not (asked[-1:] + answer[:1]).isspace():
        after_blank = encode(f" {answer}")
        if _loss(run, after_blank) < _loss(run, examples):
            run.tell(Message("the answer is read with a blank before it, as the model would say it"))
            said, examples = f" {answer}", after_blank
    return {"prompt": prompt, "answer": said, "given": answer is not None}, examples


def _loss(run: TracedRun, rows: Sequence[Sequence[Example]]) -> float:
    with torch.no_grad():
        return sum(float(run.loss(row)) for row in rows)


def _examples(run: TracedRun, table: Table, rows: Sequence[Row]) -> list[list[Example]]:
    """Encode rows as in training.

    Raises:
        DataError: one cannot be encoded, or is left out.
    """
    found = list[list[Example]]()
    for row, outcome in zip(rows, run.task.encode(rows, run.task.read(table)), strict=True):
        if isinstance(outcome, DataError):
            raise outcome
        if not outcome.examples:
            raise row.place.error(f"is left out: {outcome.reason}")
        # as a store would hold them
        found.append([_stored(run, example) for example in outcome.examples])
    return found


def _stored(run: TracedRun, example: Example) -> Example:
    arrays = {
        name: value if (column := run.task.columns[name]).is_text else column.fit(value)
        for name, value in example.arrays.items()
    }
    return Example(arrays, example.size, example.num_targets)
