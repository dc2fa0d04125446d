"""GRPO: prefer those of a model's own answers that rewards prefer.

GRPO: https://arxiv.org/abs/2402.03300, Dr. GRPO (``scale_rewards: false``): https://arxiv.org/abs/2503.20783

A row: ``{"prompt": [{"role": "user", "content": "What is 2 + 2? Only say the number."}], "answer": "4"}``
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.inject import disabled, evaluating
from peftcli.core.prompts.config import max_positions
from peftcli.data.findings import Finding
from peftcli.data.rows import Place, Reader, Row, Table
from peftcli.data.store import Column, Example, Outcome, View
from peftcli.data.used_rows import UsedRows
from peftcli.errors import DataError, UsageError
from peftcli.models import tokens
from peftcli.system.disk import write_file
from peftcli.tasks.base import Batch, Loss, Task, on_device
from peftcli.tasks.findings import REWARDED as FINDINGS
from peftcli.tasks.settings import GrpoSettings
from peftcli.tasks.shown import Label, Shown, Text
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.generation import GenerationSettings, TextGenerator, WrittenAnswer
from peftcli.tasks.text.language_model import (
    CHAT_PACKAGES,
    date_notes,
    fit_tokens,
    refuse_later_tokens,
    target_losses,
    tokenizer_fingerprint,
)
from peftcli.tasks.text.prompts import PromptForm, TextWithSystem, prompt_ids, prompt_of, prompt_text
from peftcli.tasks.text.rewards import CheckedAnswer, Rewards, columns_read, names_of, wrong_column
from peftcli.tasks.text.stop_tokens import configured_stops, missing_stops, stop_tokens
from peftcli.tasks.text.token_ids import inner_model, next_tokens, pad_texts, pad_token_id, padded
from peftcli.tasks.text.token_text import TokenRenderer

SAMPLES = "samples.jsonl"
"""In a run's folder: what the model answered to the first evaluation rows, after each evaluation."""
_SAMPLES = 8
"""Answers of an evaluation that are kept."""
_EPSILON = 1e-4
"""Added to a group's deviation, as in other implementations."""


class Groups(NamedTuple):
    """The answers to the R rows of a batch, G to each."""

    answers: list[list[WrittenAnswer]]
    values: np.ndarray
    """Rewards by each check, without their weights: (R, G, K)."""
    rewards: np.ndarray
    """Their weighted sums: (R, G)."""


class Grpo(Task[GrpoSettings]):
    """The task ``grpo``."""

    name = "grpo"
    unit = "prompt tokens"
    columns: ClassVar = {
        "input_ids": Column(),
        "chat": Column("bool", ()),
        "row": Column("str"),
        "place": Column("str"),
    }
    identity = ("input_ids",)
    origins = ("place",)
    versions = CHAT_PACKAGES
    loss_falls = False
    lower_is_better = ("loss", "kl", "answers_cut")
    main_metric = "reward"

    prompt_form: PromptForm
    """The form of the training rows' prompts. ``trained_on`` sets it."""
    divides = False  # answers are sampled to all rows of a batch at once

    def __init__(self, *bound: Any):
        super().__init__(*bound)
        self._shown: list[dict[str, Any]] = []

    @cached_property
    def rewards(self) -> Rewards:
        """The compiled rewards, which may be code of the user's: only who trains or measures needs them."""
        return Rewards(self.settings)

    @property
    def packages(self) -> Mapping[str, str]:
        return {"jsonschema": "metrics"} if any(each.json_schema for each in self.settings.rewards) else {}

    @property
    def notes(self) -> Sequence[str]:
        return date_notes(self.processor)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "tokenizer": tokenizer_fingerprint(self.processor),
            "columns": columns_read(self.settings.rewards),
            "positions": self._positions,
        }

    @property
    def _positions(self) -> int | None:
        return max_positions(self.base.config.get_text_config(), self.virtual_tokens)

    # --- rows ---------------------------------------------------------------------------------------------------------

    def read(self, table: Table) -> Reader:
        _ = self.rewards  # what is wrong with them stops the run here
        usual = ("prompt", "messages", "conversations", "instruction")
        beside = ("system", "tools", "input")
        found = table.reader("prompts", optional=beside, prompt=usual, **{name: (name,) for name in beside})
        for column, kind in columns_read(self.settings.rewards):
            table.refuse_missing(column, f"task.rewards.{kind}")
        own = any(each.python for each in self.settings.rewards)
        names = table.columns if own else [column for column, _ in columns_read(self.settings.rewards)]
        chat = isinstance(table.first.get(found.names["prompt"]), list)
        return Reader("messages" if chat else "prompt_completion", {name: name for name in names} | found.names)

    def encode_row(self, row: Row, reader: Reader) -> Outcome:
        names = {name: each for name, each in reader.names.items() if each not in ("messages", "conversations")}
        prompt = prompt_of(row, {name: each for name, each in names.items() if each != "instruction"})
        if isinstance(prompt, TextWithSystem):
            prompt = PromptForm(chat=False).ask(prompt.text, prompt.system)
        assert not isinstance(prompt, Row)
        try:
            text, templated = prompt_text(prompt, self.processor, decoder_only=True)
            ids = prompt_ids(text, self.processor, templated=templated, decoder_only=True)
        except (DataError, UsageError) as error:
            raise row.place.error(error.message, key=error.key, hint=error.hint) from error
        new, positions = self.settings.max_new_tokens, self._positions
        if positions and len(ids) + new > positions:
            message = f"the prompt's {len(ids):,} tokens and {new:,} new ones are more than the base model's"
            raise row.place.error(f"{message} {positions:,} positions", key="task.max_new_tokens")
        for column, kind in columns_read(self.settings.rewards):
            if problem := wrong_column(row.values.get(column), kind):
                raise row.place.error(problem, key=column)
        place = [row.place.source, row.place.number, row.place.line]
        arrays = {"input_ids": ids, "chat": templated, "row": _as_json(row.values), "place": json.dumps(place)}
        return Outcome([Example(arrays, size=len(ids), num_targets=1)], size=len(ids))

    def trained_on(self, format: str, shared: Mapping[str, str]) -> None:
        self.prompt_form = PromptForm.of_rows(format, shared, has_template=bool(self.processor.chat_template))

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        """Put prompts into one batch, with what their answers are sampled by in training."""
        prompts = [np.asarray(each.arrays["input_ids"]).tolist() for each in examples]
        return pad_texts(prompts, pad_token_id(self.processor)) | {
            "_prompts": prompts,
            "_chats": [bool(each.arrays["chat"]) for each in examples],
            "_rows": [(json.loads(each.arrays["row"]), Place(*json.loads(each.arrays["place"]))) for each in examples],
            "_draws": [each.draw for each in examples] if training else None,
            "_groups": list[Groups](),  # once they are sampled
        }

    # --- answers and their loss ---------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        if not batch["_groups"]:
            batch["_groups"].append(self._answer(inner_model(model), batch))
        (groups,) = batch["_groups"]
        return self._measured(model, batch, groups) if batch["_draws"] is None else self.loss_of(model, batch, groups)

    def _answer(self, model: nn.Module, batch: Batch) -> Groups:
        """Answer the prompts of a batch, in training a group of answers each, else greedily once; reward them."""
        count = 1 if batch["_draws"] is None else self.settings.group_size
        temperature = 0.0 if batch["_draws"] is None else self.settings.temperature
        settings = GenerationSettings(max_new_tokens=self.settings.max_new_tokens, temperature=temperature)
        found = dict[int, list[WrittenAnswer]]()
        with torch.no_grad(), evaluating(model):
            for chat in dict.fromkeys(batch["_chats"]):
                stops = stop_tokens(self.processor, chat=chat)
                generator = TextGenerator(model, self.processor, PromptForm(chat), stops)
                chosen = [at for at, each in enumerate(batch["_chats"]) if each == chat]
                rows, draws = (
                    [batch[name][at] for at in chosen] if batch[name] else [] for name in ("_prompts", "_draws")
                )
                found |= zip(chosen, generator.write(rows, settings, draws, count), strict=True)
        answers = [found[at] for at in range(len(found))]
        checked = [
            CheckedAnswer(answer.text, len(answer.ids), *row)
            for group, row in zip(answers, batch["_rows"], strict=True)
            for answer in group
        ]
        values = self.rewards(checked).reshape(len(answers), count, -1)
        return Groups(answers, values, values @ self.rewards.weights)

    def loss_of(self, model: nn.Module, batch: Batch, groups: Groups) -> Loss:
        """The loss of groups of answers, summed over the rows: of each, the mean over its answers.

        The answers are the model's own of this moment, so that nothing is clipped: one step a batch.
        """
        settings = self.settings
        advantages = advantages_of(groups.rewards, scale=settings.scale_rewards).ravel()  # (R * G,)
        answers = [answer for group in groups.answers for answer in group]
        counts = np.array([answer.ended or not settings.mask_truncated_completions for answer in answers])
        learns = counts & ((advantages != 0) | (settings.beta > 0))
        chosen = np.flatnonzero(learns).tolist() or [0]  # in several processes each runs the model
        own, mask, base = self._log_probabilities(model, batch, groups, chosen, compare=settings.beta > 0)
        device = own.device
        weights = torch.from_numpy((advantages * learns)[chosen]).to(device, own.dtype)[:, None]
        losses = -(own - own.detach()).exp() * weights
        sums = self._sums(groups, device)
        each_kl = torch.zeros_like(own)
        if base is not None:
            each_kl = ((base - own).exp() - (base - own) - 1) * torch.from_numpy(learns[chosen]).to(device)[:, None]
            losses = losses + settings.beta * each_kl
        lengths = mask.sum(1, keepdim=True).clamp(min=1)
        per_answer = (losses * mask / (lengths if settings.scale_rewards else settings.max_new_tokens)).sum()
        total = per_answer / settings.group_size
        sums |= {"loss": total.detach(), "kl": (each_kl * mask / lengths).sum().detach() / settings.group_size}
        return Loss(total, sums)

    def _measured(self, model: nn.Module, batch: Batch, groups: Groups) -> Loss:
        """What evaluation measures of one answer to each row. The loss is what training makes smaller, as a number."""
        own, mask, base = self._log_probabilities(model, batch, groups, range(len(groups.answers)), compare=True)
        assert base is not None
        each_kl = ((base - own).exp() - (base - own) - 1) * mask  # (R, T)
        sums = self._sums(groups, own.device)
        per_answer = (each_kl.sum(1) / mask.sum(1)).sum()
        total = self.settings.beta * per_answer - sums["reward"]
        sums |= {"loss": total, "kl": each_kl.sum()}
        outputs = [
            {
                "prompt": self.processor.decode(prompt),
                "answer": group[0].text,
                "reward": float(reward[0]),
                "rewards": dict(zip(self.rewards.names, values[0].tolist(), strict=True)),
            }
            for prompt, group, values, reward in zip(batch["_prompts"], *groups, strict=True)
        ]
        return Loss(total, sums, outputs)

    def _sums(self, groups: Groups, device: torch.device) -> dict[str, torch.Tensor]:
        """The sums over rows of means over their answers."""
        each = [answer for group in groups.answers for answer in group]
        count = groups.rewards.shape[1]
        found = {
            "reward": groups.rewards.sum() / count,
            "squares": (groups.rewards**2).sum() / count,
            "answer_tokens": sum(len(answer.ids) for answer in each) / count,
            "answers_cut": sum(not answer.ended for answer in each) / count,
            "without_signal": float((np.ptp(groups.rewards, axis=1) == 0).sum()),
            **{f"reward_{name}": groups.values[..., at].sum() / count for at, name in enumerate(self.rewards.names)},
        }
        return {name: torch.tensor(value, dtype=torch.float32, device=device) for name, value in found.items()}

    def _log_probabilities(
        self, model: nn.Module, batch: Batch, groups: Groups, chosen: Sequence[int], *, compare: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the log-probabilities of the tokens of the chosen answers, and which places are tokens: (N, T) each.

        The third is the base model's, to ``compare`` with, without dropout.
        """
        prompts = [prompt for prompt, group in zip(batch["_prompts"], groups.answers, strict=True) for _ in group]
        answers = [answer.ids for group in groups.answers for answer in group]
        inputs = pad_texts([prompts[at] + answers[at] for at in chosen], pad_token_id(self.processor))
        labels = padded([[IGNORED] * len(prompts[at]) + answers[at] for at in chosen], IGNORED)
        placed = on_device(inputs | {"_targets": next_tokens(labels)}, batch["input_ids"].device)
        targets = placed.pop("_targets")
        counts, temperature = targets != IGNORED, self.settings.temperature if batch["_draws"] is not None else 1.0

        def compute() -> torch.Tensor:
            losses, _ = target_losses(model, placed, targets, temperature)
            return torch.zeros(counts.shape, device=losses.device).masked_scatter(counts, -losses)

        own, base = compute(), None  # in this order: the head is looked for in the model with its adapter
        if compare:
            with torch.no_grad(), evaluating(model), disabled(model):
                base = compute()
        return own, counts, base

    # --- metrics ------------------------------------------------------------------------------------------------------

    @property
    def measures(self) -> Sequence[str]:
        named = [f"reward_{name}" for name in names_of(self.settings.rewards)]
        kl = ["kl"] if self.settings.beta else []
        return ["reward", *named, "without_signal", "answer_tokens", "answers_cut", *kl]

    @property
    def reports(self) -> Sequence[str]:
        known = ("loss", "reward", "reward_std", "kl", "answer_tokens", "answers_cut")
        return (*known, *(f"reward_{name}" for name in names_of(self.settings.rewards)))

    def metrics(self, sums: Mapping[str, np.ndarray], outputs: Sequence[Any], num_targets: int) -> dict[str, float]:
        self._shown = list(outputs[:_SAMPLES]) or self._shown
        found = {name: float(value) / num_targets for name, value in sums.items() if name != "without_signal"}
        found["kl"] /= found["answer_tokens"]
        return found | {"reward_std": math.sqrt(max(found.pop("squares") - found["reward"] ** 2, 0))}

    def illustrate(self, model: nn.Module, folder: Path, step: int) -> None:
        path = folder / SAMPLES
        before = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in before if json.loads(line)["step"] < step]  # a resumed run evaluates again
        new = [json.dumps({"step": step, **each}, ensure_ascii=False) for each in self._shown]
        write_file(path, "".join(f"{line}\n" for line in [*kept, *new]).encode())

    # --- the model ----------------------------------------------------------------------------------------------------

    def fit_model(self, model: nn.Module, config: AdapterConfig | None) -> list[str]:
        return fit_tokens(model, self.processor, config, self.base.spec)

    def check_model(self, model: nn.Module) -> None:
        refuse_later_tokens(model, self.probe())

    def probe(self) -> Batch:
        """Random tokens (2, 16)."""
        vocabulary = self.base.config.get_text_config().vocab_size
        return {"input_ids": torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))}

    def save(self, folder: Path) -> list[str]:
        limits = {"max_new_tokens": self.settings.max_new_tokens, "num_beams": 1}
        own = self.write_task(folder, generation=limits, prompt=self.prompt_form)
        return [own, *tokens.save_with_adapter(folder, self.processor, self.base.spec)]

    def stops(self, model: nn.Module) -> list[int]:
        return missing_stops(self.processor, configured_stops(model), chat=self.prompt_form.chat)

    # --- inspection ---------------------------------------------------------------------------------------------------

    def show(self, example: Example) -> Shown:
        ids = np.asarray(example.arrays["input_ids"]).tolist()
        row, renderer = json.loads(example.arrays["row"]), TokenRenderer(self.processor)
        wanted = [Label(f"{column}: {row[column]}") for column, _ in columns_read(self.settings.rewards)]
        return Shown([Text(renderer.render(ids, [IGNORED] * len(ids))), *wanted], {"input_ids": ids})

    def findings(self, view: View) -> list[Finding]:
        rows, compared = UsedRows(view), columns_read(self.settings.rewards)
        found = list[Finding]()
        for column, _ in compared:
            wanted = {json.dumps(json.loads(view[at].arrays["row"])[column]) for at in range(len(view))}
            if len(wanted) == 1 and len(view) > 1:
                found += rows.findings([(FINDINGS["constant_reward"], np.ones(len(view), bool))])
        return found


def advantages_of(rewards: np.ndarray, *, scale: bool) -> np.ndarray:
    """Return by how much each reward of a group exceeds their mean, (R, G), scaled by their deviation or not.

    Equal rewards give exact zeros.
    """
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    centred[np.ptp(rewards, axis=1) == 0] = 0
    return centred / (rewards.std(axis=1, ddof=1, keepdims=True) + _EPSILON) if scale else centred


def _as_json(values: Mapping[str, Any]) -> str:
    """The values of a row that JSON has; dates and the like become texts."""
    return json.dumps({name: each for name, each in values.items() if not isinstance(each, bytes)}, default=str)


TASK = Grpo
