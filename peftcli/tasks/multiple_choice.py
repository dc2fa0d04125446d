"""Multiple choice: which of some answers fits a question (SWAG: https://arxiv.org/abs/1808.05326).

A row: ``{"question": "What does Ada do?", "choices": ["She writes.", "It rains."], "label": 0}``. Each choice gets a
score of its own, so that rows may have any number of them, in any order.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.data.rows import Reader, Row, Table, shortened
from peftcli.data.store import Column, Example, Outcome, View
from peftcli.tasks import CHOICES, CHOSEN, settings
from peftcli.tasks.base import Batch, Loss, PredictOptions, Task, in_batches, model_inputs, on_device, table_of
from peftcli.tasks.parts import Parts, RowScore, join, loss_parts, means
from peftcli.tasks.shown import Description, Label, Shown, Text
from peftcli.tasks.text.answer_inputs import split
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.inputs import TextInputs
from peftcli.tasks.text.token_ids import pad_texts, pad_token_id, padded
from peftcli.tasks.text.token_text import TokenRenderer

_TRUNCATED, _TWICE = 1, 2
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class MultipleChoice(TextInputs, Task[settings.MultipleChoiceSettings]):
    """The task ``multiple_choice``."""

    name = "multiple_choice"
    arguments: ClassVar = ("question", "choices")
    columns: ClassVar = {**TextInputs.text_columns, "sizes": Column(), "label": Column(shape=())}
    """The tokens of all choices, one after another, each with the question; how many each has; the right one."""
    label_columns = ("label",)
    shares = ("context",)
    flags: ClassVar = {"truncated": _TRUNCATED}
    findings_of_flags: ClassVar = {"choice_twice": _TWICE}
    reports = ("loss", "accuracy")
    main_metric = "accuracy"
    sums_targets = True
    instead_of_texts = "compares several texts"

    def fit_model(self, model: Any, config: AdapterConfig | None) -> list[str]:
        return [*Task.fit_model(self, model, config), *super().fit_model(model, config)]

    # --- rows ---------------------------------------------------------------------------------------------------------

    def read(self, table: Table, *, labelled: bool = True) -> Reader:
        optional = ("context",) if labelled else ("context", "label")
        columns = {"question": ("question",), "context": ("context", "passage", "article")}
        return table.reader("choices", optional=optional, **columns, choices=CHOICES, label=CHOSEN)

    def encode_row(self, row: Row, reader: Reader) -> Outcome:
        choices, names = _choices(row, reader)
        label = _place(row, reader, choices, names)
        example, size = self._example(row, reader, choices)
        example.arrays["label"] = label
        flags = _TRUNCATED * (size > example.size) | _TWICE * (len(set(choices)) < len(choices))
        return Outcome([example], size=size, flags=flags)

    def _example(self, row: Row, reader: Reader, choices: Sequence[str]) -> tuple[Example, int]:
        """The example of a row without its label, and the tokens that it has uncut."""
        question, context = reader.text(row, "question", blank=False).strip(), ""
        if "context" in reader.names and row.values.get(reader.names["context"]) is not None:
            context = reader.text(row, "context").strip()
        found = [self._pair(f"{context} {question}".strip(), choice) for choice in choices]
        size, longest = sum(len(each["input_ids"]) for each in found), max(len(each["input_ids"]) for each in found)
        if longest > self.max_length:
            first = f"{self._cut(context, longest - self.max_length)} {question}".strip()
            found = [self._pair(first, choice, truncation=True, max_length=self.max_length) for choice in choices]
        arrays: dict[str, Any] = {
            "input_ids": list(chain(*(each["input_ids"] for each in found))),
            "token_type_ids": list(chain(*(each.get("token_type_ids", []) for each in found))),
            "sizes": [len(each["input_ids"]) for each in found],
            "label": 0,
        }
        return Example(arrays, len(arrays["input_ids"]), 1), size

    def _pair(self, first: str, second: str, **options: Any) -> Any:
        return self.processor(first, second, verbose=False, **options)

    def _cut(self, context: str, surplus: int) -> str:
        """A context without its last ``surplus`` tokens, so that the question after it stays whole."""
        if not self.processor.is_fast or not context:
            return context
        places = self.processor(context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in places["offset_mapping"]]
        return context[: ends[-surplus - 1]] if surplus < len(ends) else ""

    # --- the model ----------------------------------------------------------------------------------------------------

    def collate_inputs(self, examples: Sequence[Example]) -> Batch:
        """Pad the choices of all rows, row after row: (N, 1, T), which a model takes for rows of one choice."""
        batch = pad_texts([each for row in examples for each in split(row, "input_ids")], pad_token_id(self.processor))
        if len(examples[0].arrays["token_type_ids"]):
            batch["token_type_ids"] = padded([each for row in examples for each in split(row, "token_type_ids")], 0)
        return {name: value[:, None] for name, value in batch.items()}

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        return self.collate_inputs(examples) | {
            "_counts": torch.tensor([len(each.arrays["sizes"]) for each in examples]),
            "_labels": torch.tensor([int(each.arrays["label"]) for each in examples]),
        }

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        scores, counts = model(**model_inputs(batch)).logits.float()[:, 0], batch["_counts"]  # (N,), (B,)
        there = torch.arange(int(counts.max()), device=scores.device) < counts[:, None]
        table = scores.new_full(there.shape, -torch.inf).masked_scatter(there, scores)  # (B, C)
        losses = F.cross_entropy(table, batch["_labels"], reduction="none")
        each = {"loss": losses.detach(), "correct": table.argmax(-1) == batch["_labels"]}
        return Loss(losses.sum(), {name: value.sum() for name, value in each.items()}, of_targets=each)

    def metrics(self, sums: Mapping[str, np.ndarray], outputs: Sequence[Any], num_targets: int) -> dict[str, float]:
        return {"loss": float(sums["loss"]) / num_targets, "accuracy": float(sums["correct"]) / num_targets}

    def parts(self, rows: Sequence[RowScore]) -> Parts:
        right = np.array([float(row.sums["correct"]) for row in rows])
        return join(loss_parts(rows), means(np.ones(len(rows)), right > 0, accuracy=right))

    def constant_metrics(self, view: View) -> dict[str, float]:
        """What guessing reaches."""
        counts = self._counts(view)
        return {"accuracy": float((1 / counts).mean()), "loss": float(np.log(counts).mean())}

    def probe(self) -> Batch:
        """Two rows of two choices."""
        return {name: value.reshape(2, 2, -1) for name, value in super().probe().items()}

    # --- for people ---------------------------------------------------------------------------------------------------

    def _counts(self, view: View) -> np.ndarray:
        """The choices of each row."""
        places = map(view.locate, range(len(view)))
        return np.array([len(store.value("sizes", at)) for store, at in places], np.float64)

    def show(self, example: Example) -> Shown:
        renderer, rows = TokenRenderer(self.processor), [each.tolist() for each in split(example, "input_ids")]
        right = int(example.arrays["label"])
        texts = [
            Text(renderer.render(ids, [0 if at == right else IGNORED] * len(ids)), f"choice {at}", beside=at > 0)
            for at, ids in enumerate(rows)
        ]
        return Shown([*texts, Label(str(right))], {"input_ids": rows})

    def describe(self, view: View) -> Description:
        counts = Counter(self._counts(view).astype(int).tolist())
        words = ", ".join(f"{rows:,} rows of {count}" for count, rows in sorted(counts.items()))
        return Description(
            {"choices": {str(count): rows for count, rows in sorted(counts.items())}}, {"choices": words}
        )

    def predict(self, model: nn.Module, rows: Sequence[Row], options: PredictOptions) -> Iterator[dict[str, Any]]:
        reader = self.read(table_of(rows, options.columns), labelled=False)
        choices = [_choices(row, reader)[0] for row in rows]
        examples = [self._example(*each)[0] for each in zip(rows, [reader] * len(rows), choices, strict=True)]
        device = next(model.parameters()).device

        def compute(some: Sequence[Example]) -> Sequence[torch.Tensor]:
            with torch.inference_mode():
                scores = model(**on_device(self.collate_inputs(some), device)).logits.float()[:, 0].cpu()
            return scores.split([len(each.arrays["sizes"]) for each in some])

        for texts, scores in zip(choices, in_batches(examples, options.batch_size, compute), strict=True):
            best = int(scores.argmax())
            yield {"choice": best, "text": texts[best], "scores": scores.softmax(-1).tolist()}


def _choices(row: Row, reader: Reader) -> tuple[list[str], list[str]]:
    """The choices of a row, and their names where it has them, as ``{"text": [...], "label": ["A", "B"]}``."""
    value, key, names = reader.value(row, "choices"), reader.names["choices"], list[str]()
    if isinstance(value, str):  # as tables of texts, and the command line, have lists
        value = _list_in(value)
    if isinstance(value, dict):
        names, value = [str(each) for each in value.get("label") or ()], value.get("text")
    if not isinstance(value, list) or not all(isinstance(each, str) and each.strip() for each in value):
        raise row.place.error(f"expected a list of texts, found {shortened(value)}", key=key)
    if len(value) < 2:
        raise row.place.error("holds one choice, and a row needs two or more", key=key)
    return [each.strip() for each in value], names


def _list_in(text: str) -> Any:
    """The list that a text holds, as JSON or as Python writes it; any other text as it is."""
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(text)
    return text


def _place(row: Row, reader: Reader, choices: Sequence[str], names: Sequence[str]) -> int:
    """The place of the right choice, which a row gives as a place from 0, as its text, its name, or a letter."""
    value, key = reader.value(row, "label"), reader.names["label"]
    text = str(value).strip()
    if isinstance(value, str) and text in choices:
        return choices.index(text)
    if text in names:
        return names.index(text)
    letters = _LETTERS[: len(choices)]
    if isinstance(value, str) and len(text) == 1 and text in letters:
        return letters.index(text)
    with suppress(ValueError, TypeError):
        number = -1.0 if isinstance(value, bool) else float(value)
        if number in range(len(choices)):
            return int(number)
    expected = f"expected a place from 0 to {len(choices) - 1}, or the text of one of the {len(choices)} choices"
    raise row.place.error(f"{expected}, found {shortened(value)}", key=key)


TASK = MultipleChoice
