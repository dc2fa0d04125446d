"""Masked language modelling: find the words of a text that are masked (BERT: https://arxiv.org/abs/1810.04805).

Fitting an encoder to the texts of a field: https://arxiv.org/abs/2004.10964

A row: ``{"text": "Any text."}``
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from peftcli.data.findings import Finding, Records
from peftcli.data.rows import USED, Reader, Row, Table
from peftcli.data.store import Column, Example, Outcome, View
from peftcli.errors import DataError, ModelError
from peftcli.models.open import OpenBase
from peftcli.tasks import settings
from peftcli.tasks.base import Batch, Loss, PredictOptions, Task, in_batches, model_inputs, on_device, table_of
from peftcli.tasks.findings import MASKED as FINDINGS
from peftcli.tasks.shown import Description, Shown, Text
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.inputs import TextInputs
from peftcli.tasks.text.language_model import target_losses
from peftcli.tasks.text.token_ids import padded, token_metrics
from peftcli.tasks.text.token_text import TokenRenderer, special_tokens
from peftcli.tasks.text.words import joined_words, owners, words_of

_SPLIT, _UNKNOWN = 1, 2
_NOTHING = "nothing but special tokens"
_MASKED, _REPLACED = 0.8, 0.9
"""Below the first of two numbers from 0 to 1 a token becomes the mask token, below the second a random one."""
_MANY_UNKNOWN = 0.1
_FILLS, _LABEL = 5, "masked"
_NEVER = -1
"""The word of a token that is never masked."""


class MaskedLM(TextInputs, Task[settings.MaskedLMSettings]):
    """The task ``masked_lm``."""

    name = "masked_lm"
    arguments: ClassVar = ("text",)
    columns: ClassVar = {**TextInputs.text_columns, "words": Column()}
    """``words``: of each token, the number of its word, whose tokens are masked together."""
    flags: ClassVar = {"split": _SPLIT}
    findings_of_flags: ClassVar = {"rows_split": _SPLIT, "unknown_tokens": _UNKNOWN}
    reports = ("loss", "perplexity", "token_accuracy")
    sums_targets = True

    def __init__(self, settings: settings.MaskedLMSettings, processor: Any, base: OpenBase):
        super().__init__(settings, processor, base)
        if processor.mask_token_id is None:
            hint = "name an encoder that was trained to fill masks, as BERT, RoBERTa or ModernBERT"
            raise ModelError(f"{base.name} has no mask token", key="base_model", hint=hint)
        if getattr(base.config, "is_encoder_decoder", False):
            hint = "name an encoder, as BERT, RoBERTa or ModernBERT"
            raise ModelError(f"{base.name} is an encoder-decoder, which writes texts", key="base_model", hint=hint)
        if settings.whole_words and not processor.is_fast:
            raise DataError("needs a tokenizer that knows places in the text (a fast one)", key="task.whole_words")

    @cached_property
    def _special(self) -> np.ndarray:
        return np.array(sorted(special_tokens(self.processor)))

    @cached_property
    def _vocabulary(self) -> np.ndarray:
        """The tokens of texts, of which random ones are drawn."""
        return np.setdiff1d(np.arange(len(self.processor)), self._special)

    @property
    def judges_rows(self) -> bool:
        return False

    # --- rows ---------------------------------------------------------------------------------------------------------

    def read(self, table: Table) -> Reader:
        return table.reader("texts", text=("text",))

    def encode_row(self, row: Row, reader: Reader) -> Outcome:
        text, places = reader.text(row, "text", blank=False), self.settings.whole_words
        found = self.processor(text, return_special_tokens_mask=True, return_offsets_mapping=places, verbose=False)
        ids = np.array(found["input_ids"], np.int64)
        is_special = np.isin(ids, self._special)
        words = np.arange(len(ids))
        if places:
            words = self._words(row, reader, found["offset_mapping"])
        words[is_special] = _NEVER
        parts = self._parts(np.array(found["special_tokens_mask"], bool))
        kinds = np.array(found.get("token_type_ids", []))
        examples = list[Example]()
        for part in parts:
            if count := self._count(ids[part], words[part]):
                arrays = {"input_ids": ids[part], "token_type_ids": kinds[part] if len(kinds) else kinds}
                examples.append(Example(arrays | {"words": words[part]}, len(part), count))
        unknown = int((ids == self.processor.unk_token_id).sum()) if self.processor.unk_token_id is not None else 0
        flags = _SPLIT * (len(parts) > 1) | _UNKNOWN * (unknown >= _MANY_UNKNOWN * len(ids))
        return Outcome(examples, USED if examples else _NOTHING, size=len(ids), flags=flags)

    def _words(self, row: Row, reader: Reader, places: Sequence[tuple[int, int]]) -> np.ndarray:
        """The word of each token; one that is in none, as a token of blanks, is a word of its own."""
        words = joined_words(words_of(row, reader), places)
        owner = owners(words)
        found = [max(owner[start:end], default=-1) for start, end in places]
        return np.array([word if word >= 0 else len(words.spans) + at for at, word in enumerate(found)])

    def _parts(self, is_added: np.ndarray) -> list[np.ndarray]:
        """The tokens of each example of a row: a part of the text, between the tokens that the tokenizer adds."""
        own = np.flatnonzero(~is_added)
        if not len(own):
            return []
        before, after = np.arange(own[0]), np.arange(own[-1] + 1, len(is_added))
        room = max(1, self.max_length - len(before) - len(after))
        number = math.ceil(len(own) / room)
        return [np.concatenate([before, part, after]) for part in np.array_split(own, number)]

    def _count(self, ids: np.ndarray, words: np.ndarray) -> int:
        """How many tokens of an example are masked: the share that is set, rounded at random, by the text alone."""
        there = int((words != _NEVER).sum())
        count = self.settings.mlm_probability * there + np.random.default_rng(_key(ids)).random()
        return min(there, max(1, int(count)))

    # --- batches ------------------------------------------------------------------------------------------------------

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        """Mask each row by its ``draw`` and its text. ``_weights`` (B,) make up for words that do not fit."""
        batch, labels, weights = self.collate_inputs(examples), list[np.ndarray](), list[float]()
        for at, example in enumerate(examples):
            ids = np.asarray(example.arrays["input_ids"], np.int64)
            chosen, shown = self._masked(example)
            batch["input_ids"][at, : len(ids)] = torch.from_numpy(shown)
            labels.append(np.where(chosen, ids, IGNORED))
            weights.append(example.num_targets / chosen.sum())
        targets = torch.tensor([example.num_targets for example in examples])
        return batch | {"labels": padded(labels, IGNORED), "_weights": torch.tensor(weights), "_targets": targets}

    def _masked(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens of an example are to be found, and the tokens that the model sees."""
        ids, words = (np.asarray(example.arrays[name], np.int64) for name in ("input_ids", "words"))
        draw = np.random.default_rng([_key(ids), example.draw])
        chosen = np.isin(words, _choose(words[words != _NEVER], example.num_targets, draw))
        kind, other = draw.random(len(ids)), draw.choice(self._vocabulary, len(ids))
        shown = np.where(kind < _MASKED, self.processor.mask_token_id, np.where(kind < _REPLACED, other, ids))
        return chosen, np.where(chosen, shown, ids)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The cross-entropy of the masked tokens, each row's scaled to the number of its targets."""
        inputs = {name: value for name, value in model_inputs(batch).items() if name != "labels"}
        labels, targets, weights = batch["labels"], batch["_targets"], batch["_weights"]
        losses, correct = target_losses(model, inputs, labels)
        rows = (labels != IGNORED).nonzero()[:, 0]
        each = {"loss": losses * weights[rows], "correct": correct * weights[rows]}
        total, apart = each["loss"].sum(), dict[str, torch.Tensor]()
        for name, values in each.items():
            sums = torch.zeros_like(weights).index_add(0, rows, values.detach())
            apart[name] = (sums / targets).repeat_interleave(targets)
        return Loss(total, {name: value.sum() for name, value in apart.items()}, of_targets=apart)

    def metrics(self, sums: Mapping[str, np.ndarray], outputs: Sequence[Any], num_targets: int) -> dict[str, float]:
        return token_metrics(sums, num_targets)

    def constant_metrics(self, view: View) -> dict[str, float]:
        return {"loss": math.log(self.base.config.get_text_config().vocab_size)}

    # --- for people ---------------------------------------------------------------------------------------------------

    def record_findings(self, records: Records) -> list[Finding]:
        nothing = records.findings(FINDINGS["nothing_to_mask"], records.with_outcome(_NOTHING))
        return [*super().record_findings(records), *nothing]

    def show(self, example: Example) -> Shown:
        """Show the text; marked is what evaluation would mask."""
        ids, renderer = np.asarray(example.arrays["input_ids"]).tolist(), TokenRenderer(self.processor)
        chosen, _ = self._masked(example)
        labels = [token if is_chosen else IGNORED for token, is_chosen in zip(ids, chosen, strict=True)]
        tokens = [replace(each, label=_LABEL if each.trained else "") for each in renderer.render(ids, labels)]
        values = {"input_ids": ids, "labels": labels, "text": renderer.text(ids)}
        return Shown([Text(tokens, label_names=(_LABEL,))], values, f"{example.num_targets:,} masked")

    def describe(self, view: View) -> Description:
        masked, tokens = int(view.targets.sum()), int(view.sizes.sum())
        share = masked / max(1, tokens)
        return Description({"share_masked": share}, {"masked tokens": f"{masked:,} ({share:.1%}) in each pass"})

    def predict(self, model: nn.Module, rows: Sequence[Row], options: PredictOptions) -> Iterator[dict[str, Any]]:
        """Fill the masks of texts, each by itself: five tokens and their probabilities, the likeliest first."""
        reader = self.read(table_of(rows, options.columns))
        examples = [self._asked(row, reader) for row in rows]
        device, mask = next(model.parameters()).device, self.processor.mask_token_id

        def compute(some: Sequence[Example]) -> list[tuple[torch.Tensor, torch.Tensor]]:
            batch = self.collate_inputs(some)
            there = batch["input_ids"] == mask
            with torch.inference_mode():
                logits = model(**on_device(batch, device)).logits[:, -there.shape[1] :]  # virtual tokens stand before
            found = logits[there.to(device)].float().softmax(-1).topk(_FILLS)
            counts = there.sum(1).tolist()
            return [*zip(found.values.cpu().split(counts), found.indices.cpu().split(counts), strict=True)]

        for scores, tokens in in_batches(examples, options.batch_size, compute):
            yield {"fills": [self._fills(*each) for each in zip(tokens.tolist(), scores.tolist(), strict=True)]}

    def _fills(self, tokens: Sequence[int], scores: Sequence[float]) -> list[dict[str, Any]]:
        return [
            {"token": self.processor.decode([token]), "score": score}
            for token, score in zip(tokens, scores, strict=True)
        ]

    def _asked(self, row: Row, reader: Reader) -> Example:
        """A text with masks."""
        found = self.processor(reader.text(row, "text", blank=False), verbose=False)
        ids, mask = found["input_ids"], self.processor.mask_token
        if self.processor.mask_token_id not in ids:
            raise row.place.error(
                "has no mask", key=reader.names["text"], hint=f"Write {mask} for what is to be found."
            )
        if len(ids) > self.max_length:
            message = f"has {len(ids)} tokens, more than the {self.max_length} that are read"
            raise row.place.error(message, key=reader.names["text"], hint="Ask with a part of the text.")
        return Example({"input_ids": ids, "token_type_ids": found.get("token_type_ids", [])}, len(ids), 1)


def _choose(words: np.ndarray, count: int, draw: np.random.Generator) -> list[int]:
    """Draw words with ``count`` tokens together, or fewer where none fits any more; at least one word.

    ``words`` (N,) are those of the tokens.
    """
    names, sizes = np.unique(words, return_counts=True)
    chosen, left = list[int](), count
    order = draw.permutation(len(names))
    for at in order:
        if sizes[at] <= left:
            chosen.append(int(names[at]))
            left -= int(sizes[at])
        if not left:
            break
    return chosen or [int(names[order[0]])]


def _key(ids: np.ndarray) -> int:
    """A number for a text, by which its random numbers are drawn."""
    return zlib.crc32(np.asarray(ids, np.int64).tobytes())


TASK = MaskedLM
