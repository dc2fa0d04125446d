"""Preference: answer as the chosen answers do, and not as the rejected ones.

DPO: https://arxiv.org/abs/2305.18290, IPO: https://arxiv.org/abs/2310.12036, ORPO: https://arxiv.org/abs/2403.07691,
SimPO: https://arxiv.org/abs/2405.14734, KTO: https://arxiv.org/abs/2402.01306

A row: ``{"prompt": "What is 2 + 2?", "chosen": " 4", "rejected": " 5"}``
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.inject import evaluating
from peftcli.data.rows import Row, Table, truth_in
from peftcli.data.store import Column, Example, Outcome, View
from peftcli.errors import DataError
from peftcli.models import tokens
from peftcli.models.open import OpenBase
from peftcli.tasks import settings
from peftcli.tasks.base import Batch, Loss, Task, refuse_unread
from peftcli.tasks.shown import Label, Shown
from peftcli.tasks.text.answer_inputs import AnswerInputs, Reference, pair_sums
from peftcli.tasks.text.answers import PAIR, AnswerReader, answer_reader
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.language_model import refuse_later_tokens, target_losses
from peftcli.tasks.text.prompts import PromptForm
from peftcli.tasks.text.stop_tokens import configured_stops, missing_stops
from peftcli.tasks.text.token_ids import next_tokens, pad_texts, pad_token_id, padded

_REFERRING = ("dpo", "ipo", "kto")
_LOSSES_OF = {
    "label_smoothing": ("dpo", "simpo"),
    "simpo_gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""Settings -> the losses that read them."""
_HALF = 0.5


class Answers(NamedTuple):
    """What a model says of the answers of a batch, (R,) each."""

    sums: torch.Tensor
    """The log-probability of the answer."""
    lengths: torch.Tensor
    """Its tokens."""
    nll: torch.Tensor
    """The loss of all tokens that have a label."""

    @property
    def means(self) -> torch.Tensor:
        """The log-probability of an answer's token."""
        return self.sums / self.lengths


class Preference(AnswerInputs, Task[settings.PreferenceSettings]):
    """The task ``preference``."""

    name = "preference"
    columns: ClassVar = {**AnswerInputs.answer_columns, "good": Column("int8", ())}
    label_columns = ("good",)
    main_metric = "reward_accuracy"
    lower_is_better = ("loss", "nll", "kl", "reward_rejected")

    def __init__(self, settings: settings.PreferenceSettings, processor: Any, base: OpenBase):
        super().__init__(settings, processor, base)
        self.reference = Reference(settings.reference)
        for name, losses in _LOSSES_OF.items():
            if settings.loss not in losses:
                refuse_unread(settings, [name], f"is a setting of {' and '.join(losses)}")
        if settings.reference and settings.loss not in _REFERRING:
            raise DataError(f"{settings.loss} compares with no reference", key="task.reference")

    @property
    def answers(self) -> Sequence[str]:
        """The columns that hold answers."""
        return ("completion",) if self.settings.loss == "kto" else PAIR

    @property
    def divides(self) -> bool:
        return self.settings.loss != "kto"  # whose KL is estimated over a micro-batch

    def refuse_rows(self, examples: View, count: int, *, training: bool) -> None:
        if self.settings.loss == "kto" and min(count, len(examples)) == 1:
            raise DataError(
                "kto compares the rows of a batch, and a batch of one has no other: its KL would always be 0",
                key=f"training.per_device_{'train' if training else 'eval'}_batch_size",
            )

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"answers": list(self.answers)}

    def check_model(self, model: nn.Module) -> None:
        refuse_later_tokens(model, self.probe())

    def begin(self, model: nn.Module, from_adapter: bool) -> None:
        if self.settings.loss in _REFERRING:
            self.reference.begin(model, self.probe(), from_adapter)
            self.settings = replace(self.settings, reference=self.reference.kind)

    def trained_on(self, format: str, shared: Mapping[str, str]) -> None:
        self.prompt_form = PromptForm.of_rows(format, shared, has_template=bool(self.processor.chat_template))

    def save(self, folder: Path) -> list[str]:
        own = self.write_task(folder, settings=self.settings, config={}, prompt=self.prompt_form)
        return [own, *tokens.save_with_adapter(folder, self.processor, self.base.spec)]

    def stops(self, model: nn.Module) -> list[int]:
        return missing_stops(self.processor, configured_stops(model), chat=self.prompt_form.chat)

    def read(self, table: Table) -> AnswerReader:
        there, kto = {*table.columns, *table.source.columns}, self.settings.loss == "kto"
        if kto and {*PAIR} <= there and "completion" not in there:
            raise DataError("kto is of rows of prompt, completion and label; these hold pairs", key="task.loss")
        if not kto and {"completion", "label"} <= there and PAIR[0] not in there:
            raise DataError(
                f"{self.settings.loss} is of pairs; rows of completion and label are kto's", key="task.loss"
            )
        return answer_reader(table, self.answers, **({"label": ("label",)} if kto else {}))

    def encode(self, rows: Sequence[Row], reader: Any) -> list[Outcome | DataError]:
        outcomes = self.encode_answers(rows, reader, train_on="answers")
        for at, (row, outcome) in enumerate(zip(rows, outcomes, strict=True)):
            try:
                for example in outcome.examples if isinstance(outcome, Outcome) else ():
                    example.arrays["good"] = int(_is_good(row, reader))
            except DataError as error:
                outcomes[at] = error
        return outcomes

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        batch, labels = self.collate_inputs(examples), padded(self.in_order(examples, "labels"), IGNORED)
        batch |= {"labels": labels, "_answers": labels != IGNORED} | self.step_inputs(examples)
        if self.settings.loss == "orpo":  # whose own loss is of the chosen conversation, prompt included
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        if self.settings.loss == "kto":
            batch["_good"] = torch.tensor([int(each.arrays["good"]) for each in examples], dtype=torch.bool)
            if len(examples) > 1:
                batch |= self._mismatch(examples)
        return batch

    def step_inputs(self, examples: Iterable[Example]) -> Batch:
        """For orpo ``_tokens``, float32: the mean number of predicted tokens in a chosen conversation."""
        if self.settings.loss != "orpo":
            return {}
        tokens = [int(each.arrays["sizes"][0]) - 1 for each in examples]  # the first token is not predicted
        return {"_tokens": torch.tensor(float(np.mean(tokens)))}

    def _mismatch(self, examples: Sequence[Example]) -> Batch:
        """Each prompt with the answer of the row before: how far the model is from the reference, whatever is asked."""
        prompts, answers, targets = zip(*map(_split_at_answer, examples), strict=True)
        rows = list(zip(prompts, answers[-1:] + answers[:-1], targets[-1:] + targets[:-1], strict=True))
        ids = [np.concatenate([prompt, answer])[: self.max_length] for prompt, answer, _ in rows]
        labels = [np.concatenate([np.full(len(prompt), IGNORED), kept])[: self.max_length] for prompt, _, kept in rows]
        batch = pad_texts(ids, pad_token_id(self.processor)) | {"labels": padded(labels, IGNORED)}
        return {f"_kl_{name}": value for name, value in batch.items()}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of a batch. The reference answers without dropout, and before the model's own graph is made."""
        reference, far = None, torch.zeros((), device=batch["input_ids"].device)
        if self.settings.loss in _REFERRING:
            with torch.no_grad(), evaluating(model):
                own = _answers(model, batch, "_kl_").sums if "_kl_labels" in batch else far
                with self.reference(model):
                    reference = _answers(model, batch).sums
                    if "_kl_labels" in batch:
                        far = (own - _answers(model, batch, "_kl_").sums).mean().clamp(min=0)
        found = _answers(model, batch)
        if self.settings.loss == "kto":
            assert reference is not None
            return self._kto(found.sums - reference, far, batch["_good"])
        return self._pairs(found, reference, batch.get("_tokens"))

    def _pairs(self, found: Answers, reference: torch.Tensor | None, tokens: torch.Tensor | None) -> Loss:
        """The loss of pairs, from the answers, the reference's log-probabilities (2 B,), and ``step_inputs``."""
        beta, kind = self.settings.beta, self.settings.loss
        rewards = beta * (found.means if reference is None else found.sums - reference)
        chosen, rejected = rewards.chunk(2)
        if kind == "ipo":
            assert reference is not None
            one, other = ((found.sums - reference) / found.lengths).chunk(2)
            losses = (one - other - 1 / (2 * beta)) ** 2
        elif kind == "orpo":
            one, other = (found.means - _log1mexp(found.means)).chunk(2)  # log odds
            losses = -beta * F.logsigmoid(one - other)
        else:
            gap = chosen - rejected - (self.settings.simpo_gamma if kind == "simpo" else 0)
            share = self.settings.label_smoothing
            losses = -(1 - share) * F.logsigmoid(gap) - share * F.logsigmoid(-gap)
        sums = {"reward_chosen": chosen.detach().sum(), "reward_rejected": rejected.detach().sum()}
        if reference is not None:
            sums["kl_chosen"] = (found.sums.detach() - reference).chunk(2)[0].sum()
        total, sums = losses.sum(), pair_sums(losses.sum(), chosen, rejected) | sums
        if tokens is not None:
            nll = found.nll.chunk(2)[0].sum()
            total, sums = total + nll / tokens, sums | {"nll": nll.detach(), "tokens": tokens * len(chosen)}
        return Loss(total, sums)

    def _kto(self, ratios: torch.Tensor, far: torch.Tensor, good: torch.Tensor) -> Loss:
        """The loss of single answers, from their log-probabilities above the reference's (B,)."""
        given, sign = self.settings, torch.where(good, 1.0, -1.0)
        weights = torch.where(good, given.desirable_weight, given.undesirable_weight)
        total = (weights * (1 - torch.sigmoid(given.beta * sign * (ratios - far)))).sum()
        rewards = given.beta * ratios.detach()
        sums = {
            "loss": total.detach(),
            "reward_accuracy": (rewards * sign > 0).sum(),
            "reward_chosen": rewards[good].sum(),
            "reward_rejected": rewards[~good].sum(),
            "good": good.sum(),
            "kl": far * len(good),
            "compared": torch.tensor(len(good) if len(good) > 1 else 0),  # the last batch may be one row
        }
        return Loss(total, sums)

    @property
    def reports(self) -> Sequence[str]:
        known = ("loss", "reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected")
        more = {"kto": ["kl"], "orpo": ["nll"], "dpo": ["kl_chosen"], "ipo": ["kl_chosen"]}
        return (*known, *more.get(self.settings.loss, []))

    def constant_metrics(self, view: View) -> dict[str, float]:
        return {"reward_accuracy": 0.5} if self.settings.loss != "kto" else {}

    def metrics(self, sums: Mapping[str, np.ndarray], outputs: Sequence[Any], num_targets: int) -> dict[str, float]:
        if self.settings.loss != "kto":
            found = {name: float(value) / num_targets for name, value in sums.items()}
            if tokens := found.pop("tokens", None):
                found["nll"] /= tokens
                found["loss"] += found["nll"]
            return found
        good = float(sums["good"])
        found = {name: float(sums[name]) / num_targets for name in ("loss", "reward_accuracy")}
        found["kl"] = float(sums["kl"]) / max(float(sums["compared"]), 1)
        found["reward_chosen"] = float(sums["reward_chosen"]) / max(good, 1)
        found["reward_rejected"] = float(sums["reward_rejected"]) / max(num_targets - good, 1)
        return found | {"reward_margin": found["reward_chosen"] - found["reward_rejected"]}

    def show(self, example: Example) -> Shown:
        texts = self.shown_answers(example, self.answers)
        marks = [Label("good" if example.arrays["good"] else "not good")] if self.settings.loss == "kto" else []
        return Shown([*texts, *marks])


def _answers(model: nn.Module, batch: Batch, prefix: str = "") -> Answers:
    """Run the model over the answers of a batch, or over those whose names have a prefix."""
    inputs = {name: batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask")}
    targets = next_tokens(batch[f"{prefix}labels"])
    losses, _ = target_losses(model, inputs, targets)
    counts = targets != IGNORED
    each = torch.zeros(counts.shape, device=losses.device).masked_scatter(counts, losses)  # (R, T)
    mask = counts if prefix else F.pad(batch["_answers"][:, 1:], (0, 1))
    return Answers(-(each * mask).sum(1), mask.sum(1), each.sum(1))


def _log1mexp(value: torch.Tensor) -> torch.Tensor:
    """``log(1 - exp(value))`` of negative values."""
    value = value.clamp(max=-1e-7)
    return torch.where(value > -_HALF, torch.log(-torch.expm1(value)), torch.log1p(-value.exp()))


def _split_at_answer(example: Example) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tokens before the answer, those from its first one on, and the labels of these."""
    ids, labels = (np.asarray(example.arrays[name]) for name in ("input_ids", "labels"))
    first = int(np.flatnonzero(labels != IGNORED)[0])
    return ids[:first], ids[first:], labels[first:]


def _is_good(row: Row, reader: AnswerReader) -> bool:
    """Whether a single answer is a good one; true of pairs."""
    if "label" not in reader.names:
        return True
    value = reader.value(row, "label")
    if (found := truth_in(value)) is None:
        raise row.place.error(f"expected true or false, found {value!r:.60}", key=reader.names["label"])
    return found


TASK = Preference
