"""Reward: score an answer with one number, so that the better of two answers gets the higher one.

The loss is Bradley and Terry's, of two answers to one prompt: https://arxiv.org/abs/2203.02155

A row: ``{"prompt": "What is 2 + 2?", "chosen": " 4", "rejected": " 5"}``
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from peftcli.data.findings import Finding, Records
from peftcli.data.rows import Row, Table
from peftcli.data.store import Column, Example, Outcome, View
from peftcli.errors import DataError
from peftcli.tasks import settings
from peftcli.tasks.base import Batch, Loss, PredictOptions, Task, logits_of, model_inputs, number_in, table_of
from peftcli.tasks.parts import Parts, RowScore
from peftcli.tasks.shown import Facts, Shown
from peftcli.tasks.text.answer_inputs import AnswerInputs, pair_sums
from peftcli.tasks.text.answers import PAIR, AnswerReader, answer_reader, text_reader


class Reward(AnswerInputs, Task[settings.RewardSettings]):
    """The task ``reward``."""

    arguments: ClassVar = ("text",)
    columns: ClassVar = {
        **{name: column for name, column in AnswerInputs.answer_columns.items() if name != "labels"},
        "margin": Column("float32", ()),
    }
    reports = ("loss", "reward_accuracy", "reward_margin")
    main_metric = "reward_accuracy"
    name = "reward"

    def read(self, table: Table) -> AnswerReader:
        found = answer_reader(table, optional=("margin",), margin=(self.settings.margin or "margin",))
        if self.settings.margin and "margin" not in found.names:
            raise DataError(f"names a column that the rows lack: {self.settings.margin!r}", key="task.margin")
        return found

    def encode(self, rows: Sequence[Row], reader: Any) -> list[Outcome | DataError]:
        # the whole text decides the reward: all of it counts, and a cut takes some of it away
        outcomes = self.encode_answers(rows, reader, train_on="all")
        for at, (row, outcome) in enumerate(zip(rows, outcomes, strict=True)):
            try:
                for example in outcome.examples if isinstance(outcome, Outcome) else ():
                    del example.arrays["labels"]
                    example.arrays["margin"] = _margin(row, reader)
            except DataError as error:
                outcomes[at] = error
        return outcomes

    def record_findings(self, records: Records) -> list[Finding]:
        """Those of the answers, but that a score needs no end."""
        return [each for each in super().record_findings(records) if each.name != "end_not_trained"]

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        margins = torch.tensor([float(each.arrays["margin"]) for each in examples])
        return self.collate_inputs(examples) | {"_margin": margins}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        chosen, rejected = model(**model_inputs(batch)).logits.float()[:, 0].chunk(2)  # (B,) each
        total = -F.logsigmoid(chosen - rejected - batch["_margin"]).sum()
        return Loss(total, pair_sums(total, chosen, rejected))

    def constant_metrics(self, view: View) -> dict[str, float]:
        return {"reward_accuracy": 0.5}

    def metrics(self, sums: Mapping[str, np.ndarray], outputs: Sequence[Any], num_targets: int) -> dict[str, float]:
        return {name: float(value) / num_targets for name, value in sums.items()}

    def parts(self, rows: Sequence[RowScore]) -> Parts:
        right = np.array([row.sums["reward_accuracy"] >= row.num_targets for row in rows])
        return replace(super().parts(rows), right=right)

    def show(self, example: Example) -> Shown:
        margin = float(example.arrays["margin"])
        facts = [Facts({"margin": f"{margin:g}"})] if margin else []
        return Shown([*self.shown_answers(example, PAIR), *facts])

    def predict(self, model: nn.Module, rows: Sequence[Row], options: PredictOptions) -> Iterator[dict[str, Any]]:
        """Score texts, prompts with completions, or conversations, in their order; a longer one is cut."""
        table = table_of(rows, options.columns)
        try:
            reader = text_reader(table, whole=True)
        except DataError:
            if not {*PAIR} <= {*table.columns, *table.source.columns}:
                raise
            hint = "Give rows of prompt and completion, or of messages: one for each answer."
            message = "the rows hold pairs; predict scores single answers"
            raise DataError(message, file=table.described, hint=hint) from None
        examples = list[Example]()
        for row, outcome in zip(rows, self.encoder(reader, "all", "truncate")(rows), strict=True):
            if isinstance(outcome, DataError):
                raise outcome
            if not outcome.examples:
                raise row.place.error("is too short to score: it has one token")
            (example,) = outcome.examples
            examples.append(Example(example.arrays | {"sizes": [example.size]}, example.size, 1))
        for logits in logits_of(model, examples, self.collate_inputs, options.batch_size):
            yield {"reward": float(logits[0])}


def _margin(row: Row, reader: AnswerReader) -> float:
    """The number by which the rewards should differ at least; 0 where the rows have none."""
    if "margin" not in reader.names:
        return 0.0
    value = number_in(reader.value(row, "margin"))
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise row.place.error(f"expected a number, found {value!r:.60}", key=reader.names["margin"])
    return float(value)


TASK = Reward
