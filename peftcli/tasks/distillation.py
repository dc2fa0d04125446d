"""Distillation: give the next token the probabilities that a teacher gives it.

On the student's own answers: https://arxiv.org/abs/2306.13649; a prompt into weights: https://arxiv.org/abs/2112.00861

A row: ``{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}``
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peftcli.core.inject import disabled, evaluating
from peftcli.core.layer import model_ends
from peftcli.data.findings import Finding, Records
from peftcli.data.rows import Row, Table
from peftcli.data.store import Column, Example, Outcome, View
from peftcli.errors import DataError, ModelError, PeftcliError, UsageError
from peftcli.models.open import OpenBase
from peftcli.tasks import settings
from peftcli.tasks.base import Batch, Loss, OpenOther, model_inputs
from peftcli.tasks.causal_lm import CausalLM
from peftcli.tasks.shown import Shown
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.divergence import divergences
from peftcli.tasks.text.encode import CausalEncoder
from peftcli.tasks.text.fast.losses import Redo, is_trained, output_head, row_losses
from peftcli.tasks.text.findings import FINDINGS, Flag
from peftcli.tasks.text.formats import (
    SYSTEM_ROLES,
    AlpacaExample,
    ChatExample,
    ExampleReader,
    PairExample,
    ParsedRow,
)
from peftcli.tasks.text.generation import GenerationSettings, TextGenerator
from peftcli.tasks.text.language_model import Encoder, with_states
from peftcli.tasks.text.token_ids import Losses, inner_model, next_tokens, pad_labelled, pad_token_id

_PREFIX = "teacher_"
"""What the names of the teacher's columns begin with."""
_WHOLE = 1 << 30
"""A length that no row has: what the teacher reads is cut where the student's row is."""


class Distillation(CausalLM[settings.DistillationSettings]):
    """The task ``distillation``."""

    name = "distillation"
    main_metric = "kl"
    target_reports = ("loss", "kl", "top1_agreement")
    lower_is_better = ("loss", "kl")

    def __init__(self, settings: settings.DistillationSettings, processor: Any, base: OpenBase):
        super().__init__(settings, processor, base)
        self._other: nn.Module | None = None
        if settings.packing and settings.on_policy:
            message = "the answers that the student writes have no length before it does, and cannot be packed"
            raise DataError(message, key="task.on_policy", hint="Set dataset.packing: false.")
        if settings.train_on == "all" and (settings.context or settings.on_policy):
            message = "needs answers: with train_on: all, a prompt that the teacher sees otherwise would be learnt too"
            raise DataError(message, key=self._asking, hint="Set dataset.train_on: answers.")

    @property
    def _asking(self) -> str:
        """The setting that needs rows with a prompt."""
        return "task.context" if self.settings.context else "task.on_policy"

    @property
    def columns(self) -> Mapping[str, Column]:
        own = dict(super().columns)
        return own | ({f"{_PREFIX}{name}": own[name] for name in ("input_ids", "labels")} if self._differs else {})

    @property
    def _differs(self) -> bool:
        """Whether the teacher reads other tokens than the student."""
        return self.settings.context is not None

    @property
    def notes(self) -> Sequence[str]:
        if self.settings.teacher or self.settings.context:
            return super().notes
        same = "the teacher is the base model, and reads what the student reads: a new adapter has nothing to learn"
        return (*super().notes, f"{same}. Give task.teacher or task.context")

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"positions": self._positions, "new": self._new_tokens}

    @property
    def _new_tokens(self) -> int:
        """How many tokens the student may write."""
        return self.settings.max_new_tokens if self.settings.on_policy else 0

    # --- the teacher --------------------------------------------------------------------------------------------------

    def ask_others(self, open_other: OpenOther) -> None:
        super().ask_others(open_other)
        if not self._is_other:
            return
        try:
            tokenizer = self._opened.processor
        except PeftcliError as error:
            error.key = "task.teacher"
            raise
        _refuse_other_vocabulary(tokenizer, self.processor, self.settings.teacher, self.base.name)

    @property
    def _is_other(self) -> bool:
        """Whether the teacher is another model than the base model."""
        return self.settings.teacher not in (None, self.base.name)

    @property
    def _opened(self) -> Any:
        return self.open_other(str(self.settings.teacher), "causal_lm")

    def check_model(self, model: nn.Module) -> None:
        super().check_model(model)
        if self.settings.on_policy and any(map(_is_divided, model.parameters())):
            message = "a model that is divided among processes cannot write answers while it trains"
            raise ModelError(message, key="task.on_policy", hint="Set launch.strategy: ddp.")

    @contextmanager
    def _teacher(self, model: nn.Module) -> Iterator[nn.Module]:
        """Inside, what is returned answers as the teacher: another model, or the student's without its adapter."""
        if self._is_other:
            if self._other is None:
                inner = inner_model(model)
                dtype = inner.get_input_embeddings().weight.dtype
                self._other = self._opened.model(dtype).to(inner.device)
            with torch.no_grad():
                yield self._other
        else:
            with torch.no_grad(), evaluating(model), disabled(model):
                yield model

    # --- rows ---------------------------------------------------------------------------------------------------------

    def read(self, table: Table) -> ExampleReader:
        reader = super().read(table)
        if reader.name == "text" and (self.settings.context or self.settings.on_policy):
            message = f"needs rows with a prompt and an answer; {table.described} has texts alone"
            raise DataError(message, key=self._asking)
        return reader

    def encoder_of(self, reader: Any) -> Encoder:
        own = super().encoder_of(reader)
        if self.settings.context is None:
            return own
        whole = replace(self.settings, max_length=_WHOLE)
        with_context = _ContextReader(reader.name, reader.names, own=reader, context=self.settings.context)
        return _Pairs(own, CausalEncoder(with_context, self.processor, whole), self.processor, self.settings.context)

    def encode(self, rows: Sequence[Row], reader: Any) -> list[Outcome | DataError]:
        outcomes = super().encode(rows, reader)
        return [self._checked(outcome, row) for outcome, row in zip(outcomes, rows, strict=True)]

    def _checked(self, outcome: Outcome | DataError, row: Row) -> Outcome | DataError:
        """Return the outcome of a row, or the error that the base model has too few positions for it."""
        if isinstance(outcome, DataError) or self._positions is None:
            return outcome
        for example in outcome.examples if self._differs or self._new_tokens else ():
            read = _seen_by_teacher(example)
            written = len(_before_answer(read)) + self._new_tokens if self._new_tokens else 0
            if (needed := max(len(read.arrays["input_ids"]), written)) > self._positions:
                what = f"with its context, the row may have {needed:,} tokens, more than the base model's"
                return row.place.error(f"{what} {self._positions:,} positions{self._aside}", key="dataset.max_length")
        return outcome

    def record_findings(self, records: Records) -> list[Finding]:
        seen = records.findings(FINDINGS["context_in_row"], records.with_flag(Flag.HAS_CONTEXT), of_used=True)
        return super().record_findings(records) + seen

    def join(self, examples: Sequence[Example]) -> Example:
        joined = super().join(examples)
        if self._differs:
            read = super().join(list(map(_seen_by_teacher, examples))).arrays
            joined.arrays |= {f"{_PREFIX}{name}": value for name, value in read.items()}
        return joined

    def samples(self) -> list[Example]:
        samples = super().samples()
        for each in samples if self._differs else ():
            each.arrays |= {f"{_PREFIX}{name}": value for name, value in each.arrays.items()}
        return samples

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        batch = super().collate(examples, training=training)
        if self._differs:
            read = pad_labelled(list(map(_seen_by_teacher, examples)), pad_token_id(self.processor))
            batch |= {f"_{_PREFIX}{name}": value for name, value in read.items()}
        if training and self.settings.on_policy:
            batch["_drawn"] = [_Drawn.of(each, self.settings.on_policy) for each in examples]
        return batch

    def show(self, example: Example) -> Shown:
        shown = super().show(example)
        if not self._differs:
            return shown
        ids, labels = (np.asarray(example.arrays[f"{_PREFIX}{name}"]).tolist() for name in ("input_ids", "labels"))
        read = [replace(text, title="what the teacher reads") for text in self.texts(ids, labels)]
        return replace(shown, parts=[*shown.parts, *read])

    # --- the loss -----------------------------------------------------------------------------------------------------

    def loss_of_targets(self, model: nn.Module, batch: Batch) -> Loss:
        """The divergence at each target token. The teacher answers before the student's graph is made."""
        weights = None
        if drawn := batch.get("_drawn"):
            batch, weights = self._with_own_answers(model, batch, drawn)
        given, targets = _given(model_inputs(batch))
        output_head(inner_model(model), given)  # looked for with the adapter on, which may call the head once more
        read, aligned = given, targets
        if self._differs:
            names = {name: value for name, value in batch.items() if name.startswith(f"_{_PREFIX}")}
            read, aligned = _given({name.removeprefix(f"_{_PREFIX}"): value for name, value in names.items()})
        with self._teacher(model) as teacher:
            wanted, logits_of = with_states(teacher, read, aligned, lambda states, head: (states, head))
        compare = _Comparison(self.settings, logits_of, inner_model(model), evaluates=not model.training)
        losses, more = with_states(model, given, targets, lambda states, head: compare(states, wanted, head))
        total = (losses if weights is None else losses * _of_targets(weights, targets)).sum()
        found = {"loss": losses.detach()}
        if not model.training:
            found |= {"kl": more[:, 0], "top1_agreement": more[:, 1]}
        return Loss(total, {name: each.sum() for name, each in found.items()}, of_targets=found)

    def target_metrics(self, sums: Mapping[str, np.ndarray], num_targets: int) -> dict[str, float]:
        return {name: float(sums[name]) / num_targets for name in self.target_reports}

    def constant_metrics(self, view: View) -> dict[str, float]:
        return {}

    def _with_own_answers(self, model: nn.Module, batch: Batch, drawn: Sequence[_Drawn]) -> tuple[Batch, torch.Tensor]:
        """Let the student write the last answer of the rows that are drawn.

        Returns the batch with its answers, and a factor for each row (B,), by which it counts as in the data.
        """
        chosen = [at for at, each in enumerate(drawn) if each.writes]
        device = batch["input_ids"].device
        if not chosen:
            return batch, torch.ones(len(drawn), device=device)
        inner, chat = inner_model(model), self.prompt_form.chat
        generator = TextGenerator(inner, self.processor, self.prompt_form, self._stops_of(chat))
        limits = GenerationSettings(max_new_tokens=self.settings.max_new_tokens, temperature=1.0)
        prompts = [_before_answer(drawn[at].example).tolist() for at in chosen]
        with torch.no_grad(), evaluating(inner):
            written = generator.write(prompts, limits, [drawn[at].seed for at in chosen])
        answers = {at: each.ids for at, (each,) in zip(chosen, written, strict=True)}
        examples = [
            _answered(each.example, answers[at]) if at in answers else each.example for at, each in enumerate(drawn)
        ]
        factors = [
            drawn[at].example.num_targets / len(answers[at]) if at in answers else 1.0 for at in range(len(drawn))
        ]
        found = self.collate(examples, training=False)
        moved = {name: value.to(device) if hasattr(value, "to") else value for name, value in found.items()}
        return moved, torch.tensor(factors, device=device)


@dataclass(frozen=True)
class _Drawn:
    """An example of a training batch, and whether the student writes its answer in this step."""

    example: Example
    writes: bool
    seed: int

    @classmethod
    def of(cls, example: Example, share: float) -> _Drawn:
        draw = np.random.default_rng(example.draw)
        return cls(example, bool(draw.random() < share), int(draw.integers(1 << 62)))


@dataclass(frozen=True)
class _Comparison:
    """Compares the student's distribution with the teacher's, a chunk of tokens at a time."""

    settings: settings.DistillationSettings
    teacher_logits: Redo
    """Makes the teacher's logits (n, V) of its states."""
    model: nn.Module
    """The student's."""
    evaluates: bool
    """Whether the metrics are computed too."""

    def __call__(self, states: torch.Tensor, wanted: torch.Tensor, head: Redo) -> Losses:
        """Return the divergence (N,) of the student's states from the teacher's; in evaluation (N, 2) metrics too."""
        adapted = model_ends(self.model)[1]
        changed = adapted if adapted is not None else nn.Identity()

        def compute(part: torch.Tensor, beside: torch.Tensor) -> Losses:
            with torch.no_grad(), disabled(changed):  # an adapter of the head, which may be the teacher's too
                other = self.teacher_logits(beside)
            own = head(part)
            count = min(own.shape[1], other.shape[1])  # of one vocabulary, tables may be filled up to other sizes
            own, other = own[:, :count], other[:, :count]
            losses = divergences(own, other, self.settings.loss, self.settings.temperature)
            return losses, self._metrics(own.detach(), other)

        return row_losses(states, wanted, compute, head_trains=is_trained(head, states))

    def _metrics(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The forward KL without a temperature, and whether both choose one token: (n, 2)."""
        if not self.evaluates:
            return own.new_zeros(len(own), 0)
        same = own.argmax(-1) == other.argmax(-1)
        return torch.stack([divergences(own, other, "forward_kl", 1.0), same.float()], dim=1)


@dataclass(frozen=True, kw_only=True)
class _ContextReader(ExampleReader):
    """Reads rows as another reader does, after the teacher's context."""

    own: ExampleReader
    context: str

    def __call__(self, row: Row) -> ParsedRow:
        return _after(self.context, self.own(row))


@dataclass(frozen=True)
class _Pairs:
    """Encodes rows for the student and for the teacher."""

    own: Encoder
    teacher: Encoder
    tokenizer: Any
    context: str

    def __call__(self, rows: Sequence[Row]) -> list[Outcome | DataError]:
        pairs = zip(self.own(rows), self.teacher(rows), rows, strict=True)
        return [self._joined(own, read, row) for own, read, row in pairs]

    def _joined(self, own: Outcome | DataError, read: Outcome | DataError, row: Row) -> Outcome | DataError:
        """Add what the teacher reads of a row to the student's example, as far as that goes."""
        if isinstance(own, DataError) or not own.examples:
            return own
        if isinstance(read, DataError):
            return read
        (example,), aligned = own.examples, bool(read.examples)
        labels = np.asarray(example.arrays["labels"])
        wanted = labels[1:][labels[1:] != IGNORED]
        if aligned:
            ids, marks = (np.asarray(read.examples[0].arrays[name]) for name in ("input_ids", "labels"))
            places = np.flatnonzero(marks[1:] != IGNORED)[: len(wanted)] + 1
            aligned = np.array_equal(marks[places], wanted)
        if not aligned:
            message = "the chat template writes the answer in other tokens after the context"
            return row.place.error(f"{message}, so that teacher and student cannot be compared", key="task.context")
        end = int(places[-1]) + 1
        if not own.flags & Flag.TRUNCATED:
            end = len(ids)
        example.arrays |= {f"{_PREFIX}input_ids": ids[:end], f"{_PREFIX}labels": marks[:end]}
        own.flags |= (
            Flag.HAS_CONTEXT if self.context.strip() in self.tokenizer.decode(example.arrays["input_ids"]) else 0
        )
        return own


def _is_divided(parameter: torch.Tensor) -> bool:
    """Whether processes hold parts of a parameter: FSDP's, or DeepSpeed's."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def _after(context: str, example: ParsedRow) -> ParsedRow:
    """Return a row after a context: before its own system prompt where it has one, with a blank line between."""
    if isinstance(example, ChatExample):
        first = example.messages[0]
        if first["role"] in SYSTEM_ROLES:
            own = {**first, "content": f"{context}\n\n{first['content']}"}
            return replace(example, messages=[own, *example.messages[1:]])
        untrained = frozenset(at + 1 for at in example.untrained)
        return replace(
            example, messages=[{"role": "system", "content": context}, *example.messages], untrained=untrained
        )
    if isinstance(example, AlpacaExample):
        return replace(example, system="\n\n".join(filter(None, (context, example.system))))
    assert isinstance(example, PairExample)
    return replace(example, prompt=f"{context}\n\n{example.prompt}")


def _seen_by_teacher(example: Example) -> Example:
    """The example as the teacher reads it."""
    read = {name.removeprefix(_PREFIX): value for name, value in example.arrays.items() if name.startswith(_PREFIX)}
    return replace(example, arrays=read or example.arrays)


def _given(inputs: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The arguments of a model without the labels, and the targets (B, T)."""
    return {name: value for name, value in inputs.items() if name != "labels"}, next_tokens(inputs["labels"])


def _of_targets(weights: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The weight of each target that counts, (N,), of weights of rows (B,)."""
    return weights[:, None].expand_as(targets)[targets != IGNORED]


def _answer_start(labels: np.ndarray) -> int:
    """Where the last answer begins."""
    trained = np.flatnonzero(labels != IGNORED)
    before = np.flatnonzero(labels[: trained[-1]] == IGNORED)
    return int(before[-1]) + 1 if len(before) else int(trained[0])


def _before_answer(example: Example) -> np.ndarray:
    """The tokens before the last answer of an example."""
    return np.asarray(example.arrays["input_ids"])[: _answer_start(np.asarray(example.arrays["labels"]))]


def _answered(example: Example, answer: Sequence[int]) -> Example:
    """Return the example with another last answer, the only one that counts."""
    arrays = dict(example.arrays)
    for prefix in ("", _PREFIX):
        if f"{prefix}labels" in arrays:
            start = _answer_start(np.asarray(arrays[f"{prefix}labels"]))
            before = np.asarray(arrays[f"{prefix}input_ids"])[:start]
            arrays[f"{prefix}input_ids"] = np.concatenate([before, answer])
            arrays[f"{prefix}labels"] = np.concatenate([np.full(start, IGNORED), answer])
    return replace(example, arrays=arrays, num_targets=len(answer))


def _refuse_other_vocabulary(teacher: Any, own: Any, name: str | None, base: str) -> None:
    """Check that a teacher's tokens are the student's.

    Raises:
        UsageError: they are not.
    """
    one, other = own.get_vocab(), teacher.get_vocab()
    if one == other:
        return
    differing = [token for token in {**one, **other} if one.get(token) != other.get(token)]
    message = f"{name} has another vocabulary than {base}: {len(differing):,} tokens differ, as {differing[0]!r:.40}"
    raise UsageError(message, key="task.teacher", hint="Give a teacher of the same family, with the same tokenizer.")


TASK = Distillation
