"""Sequence to sequence: turn one text into another with an encoder-decoder (T5, BART).

A row: ``{"prompt": "translate English to German: Thank you.", "completion": "Danke."}``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from peftcli.data.collate import pad_seq2seq, pad_token_id
from peftcli.data.encode import DataReport, encode_seq2seq
from peftcli.data.formats import to_examples
from peftcli.data.load import Rows
from peftcli.schema import Dataset
from peftcli.tasks.base import Batch, Feature, Losses
from peftcli.tasks.token_loss import IGNORED, token_losses, token_metrics


class Seq2SeqLM:
    """The task ``seq2seq_lm``."""

    def features(self, rows: Rows, tokenizer: Any, dataset: Dataset) -> tuple[list[Feature], DataReport]:
        return encode_seq2seq(to_examples(rows, dataset), rows, tokenizer, dataset)

    def collate(self, features: Sequence[Feature], tokenizer: Any) -> Batch:
        return pad_seq2seq(features, pad_token_id(tokenizer))

    def num_targets(self, feature: Feature) -> int:
        return sum(label != IGNORED for label in feature["labels"])

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        return token_losses(model(**batch, use_cache=False).logits, batch["labels"])

    def metrics(self, sums: Mapping[str, float], num_targets: int) -> dict[str, float]:
        return token_metrics(sums, num_targets)


TASK = Seq2SeqLM()
