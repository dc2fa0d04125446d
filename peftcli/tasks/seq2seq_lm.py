"""Sequence to sequence: turn one text into another with an encoder-decoder (T5, BART).

A row: ``{"prompt": "translate English to German: Thank you.", "completion": "Danke."}``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from peftcli.data.store import Feature
from peftcli.schema import Dataset, Source
from peftcli.tasks.base import Batch, Losses
from peftcli.tasks.text.collate import pad_seq2seq, pad_token_id
from peftcli.tasks.text.encode import COLUMNS, Seq2SeqEncoder
from peftcli.tasks.text.formats import example_reader
from peftcli.tasks.text.token_loss import token_losses, token_metrics


class Seq2SeqLM:
    """The task ``seq2seq_lm``."""

    feature_columns = COLUMNS

    def encoder(
        self, columns: Sequence[str], source: Source, described: str, tokenizer: Any, dataset: Dataset
    ) -> Seq2SeqEncoder:
        return Seq2SeqEncoder(example_reader(columns, source, described), tokenizer, dataset)

    def collate(self, features: Sequence[Feature], tokenizer: Any) -> Batch:
        return pad_seq2seq(features, pad_token_id(tokenizer))

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        return token_losses(model(**batch, use_cache=False).logits, batch["labels"])

    def metrics(self, sums: Mapping[str, float], num_targets: int) -> dict[str, float]:
        return token_metrics(sums, num_targets)


TASK = Seq2SeqLM()
