"""Answers as the inputs of a model, and the reference: what the tasks share that compare answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from peftcli.core.inject import disabled, evaluating
from peftcli.core.weights import named_tensors
from peftcli.data.findings import Finding, Records
from peftcli.data.rows import USED, Row
from peftcli.data.store import Column, Example, Outcome
from peftcli.errors import DataError
from peftcli.tasks.base import Batch, on_device
from peftcli.tasks.settings import CausalLMSettings
from peftcli.tasks.shown import Text
from peftcli.tasks.text.answers import AnswerReader
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.encode import CausalEncoder, flag_unread
from peftcli.tasks.text.findings import CUT_OFF, FINDINGS, OVERLONG, Flag, record_findings, unread_columns
from peftcli.tasks.text.inputs import TextInputs
from peftcli.tasks.text.language_model import CHAT_PACKAGES, date_notes
from peftcli.tasks.text.prompts import prompt_start
from peftcli.tasks.text.token_ids import pad_texts, pad_token_id
from peftcli.tasks.text.token_text import TokenRenderer

Kind = Literal["base", "start"]
_TOLERANCE = 0.01
"""Largest difference of logits that counts as none, as a share of their deviation."""


class AnswerInputs(TextInputs):
    """Mixed into a ``Task`` whose examples hold one answer or two, each with its prompt, as one array."""

    answer_columns: ClassVar = {"input_ids": Column(), "labels": Column(), "sizes": Column()}
    """The tokens of all answers, one after another; the same where they are trained; how many each answer has."""
    flags: ClassVar[Mapping[str, int]] = {"truncated": Flag.TRUNCATED}
    versions: ClassVar[Sequence[str]] = CHAT_PACKAGES

    @property
    def advice(self) -> Mapping[str, str]:
        todo = f"Raise max_length, which is {self.max_length}."
        if self.max_length < self.settings.max_length:
            todo = f"Shorten the prompts: the base model reads {self.max_length} tokens."
        return {OVERLONG: todo, CUT_OFF: todo}

    @property
    def notes(self) -> Sequence[str]:
        return date_notes(self.processor)

    def record_findings(self, records: Records) -> list[Finding]:
        without, more = records.with_flag(Flag.NO_PROMPT), unread_columns(records)
        return [*record_findings(records), *records.findings(FINDINGS["no_prompt"], without, more=more, of_used=True)]

    def shared(self, row: Row, reader: Any) -> Any:
        return prompt_start(reader(row))

    def encoder(self, reader: Any, train_on: str, overlong: str) -> CausalEncoder:
        """An encoder of single answers."""
        longest: int = self.settings.max_length
        settings = CausalLMSettings(max_length=longest, overlong=overlong, train_on=train_on)  # type: ignore[arg-type]
        return CausalEncoder(reader, self.processor, settings, self.max_length)

    def encode_answers(self, rows: Sequence[Row], reader: AnswerReader, train_on: str) -> list[Outcome | DataError]:
        """Turn each row into one example of all its answers, with one target."""
        overlong = self.settings.overlong
        found = [
            self.encoder(replace(reader, answer=name, whole=train_on == "all"), train_on, overlong)(rows)
            for name in reader.answers
        ]
        joined = [_joined(row, outcomes) for row, *outcomes in zip(rows, *found, strict=True)]
        return flag_unread(joined, rows, reader)

    def collate_inputs(self, examples: Sequence[Example]) -> Batch:
        """Pad the first answers of all examples, then their second ones: ``input_ids`` and ``attention_mask``."""
        return pad_texts(self.in_order(examples, "input_ids"), pad_token_id(self.processor))

    def in_order(self, examples: Sequence[Example], column: str) -> list[np.ndarray]:
        """One column of the answers: of the first ones, then of the second ones."""
        return [row for side in zip(*(split(each, column) for each in examples), strict=True) for row in side]

    def shown_answers(self, example: Example, names: Sequence[str]) -> list[Text]:
        """The answers as texts to compare, in which what is trained is marked."""
        renderer, ids = TokenRenderer(self.processor), split(example, "input_ids")
        labels = (
            split(example, "labels") if "labels" in example.arrays else [np.full(len(each), IGNORED) for each in ids]
        )
        return [
            Text(renderer.render(row.tolist(), [IGNORED, *marks.tolist()[1:]]), name, beside=name != names[0])
            for name, row, marks in zip(names, ids, labels, strict=True)
        ]


def split(example: Example, column: str) -> list[np.ndarray]:
    """One column of an example, answer by answer."""
    return np.split(np.asarray(example.arrays[column]), np.cumsum(example.arrays["sizes"])[:-1])


def pair_sums(total: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the sums behind ``loss``, ``reward_accuracy`` and ``reward_margin``, from both rewards (B,)."""
    gap = (chosen - rejected).detach()
    return {"loss": total.detach(), "reward_accuracy": (gap > 0).sum(), "reward_margin": gap.sum()}


def _joined(row: Row, outcomes: Sequence[Outcome | DataError]) -> Outcome | DataError:
    """Join the outcomes of a row's answers."""
    if error := next((each for each in outcomes if isinstance(each, DataError)), None):
        return error
    parts = [each for each in outcomes if isinstance(each, Outcome)]
    size, lost = sum(each.size for each in parts), sum(each.lost for each in parts)
    whole = Outcome(size=size, lost=lost, common=parts[0].common)
    for each in parts:
        whole.flags |= each.flags
    whole.reason = next((each.reason for each in parts if each.reason != USED), USED)
    if whole.reason != USED:
        return whole
    arrays = [each.examples[0].arrays for each in parts]
    ids = [list(each["input_ids"]) for each in arrays]
    if len(ids) > 1 and ids[0] == ids[1]:
        if whole.flags & Flag.TRUNCATED:
            whole.reason = CUT_OFF
            return whole
        return row.place.error(
            "chosen and rejected are the same to the model: what tells them apart, such as white space or a key that "
            "the chat template leaves out, is in no token"
        )
    joined = {
        "input_ids": [number for each in ids for number in each],
        "labels": [label for each in arrays for label in each["labels"]],
        "sizes": list(map(len, ids)),
    }
    whole.examples = [Example(joined, len(joined["input_ids"]), 1)]
    return whole


class Reference:
    """Turns a model, for a while, into the one that it is compared with: the base model, or the adapter as it began.

    All that it keeps is an adapter, where one is needed.
    """

    def __init__(self, kind: Kind | None):
        """Without a kind, ``begin`` finds it."""
        self.kind = kind
        self._start: dict[str, torch.Tensor] = {}

    def begin(self, model: nn.Module, probe: Batch, from_adapter: bool) -> None:
        """Look at the adapter that training begins with: a copy of it becomes the reference where it has an effect.

        ``from_adapter``: it was trained before, so it has one, however small. Of a new adapter, the outputs for
        ``probe`` show it.
        """
        if self.kind is None and from_adapter:
            self.kind = "start"
        elif self.kind is None:
            given = on_device(probe, next(model.parameters()).device)
            with torch.no_grad(), evaluating(model):
                own = model(**given).logits.float()
                with disabled(model):
                    base = model(**given).logits.float()
            largest = (own[:, -base.shape[1] :] - base).abs().max()
            self.kind = "base" if largest <= _TOLERANCE * base.std() else "start"
        if self.kind == "start":
            self._start = {name: each.detach().clone() for name, (_, _, each) in named_tensors(model).items()}

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model is the reference.

        Raises:
            DataError: the reference is an adapter that began elsewhere.
        """
        if self.kind != "start":
            with disabled(model):
                yield
            return
        tensors = named_tensors(getattr(model, "module", model))  # DDP is around it
        if self._start.keys() != tensors.keys():
            raise DataError(
                "the adapter was compared with itself as it began, which was not kept",
                key="task.reference",
                hint="If it began from another adapter, name that: training.init_adapter_from. Else only the run that "
                "trains it can measure it.",
            )
        now = {name: parameter.data for name, (_, _, parameter) in tensors.items()}
        for name, (_, _, parameter) in tensors.items():
            parameter.data = self._start[name]
        try:
            yield
        finally:
            for name, (_, _, parameter) in tensors.items():
                parameter.data = now[name]
