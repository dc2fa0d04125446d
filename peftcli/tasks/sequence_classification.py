"""Sequence classification: put a text, or a pair of texts, into a class, into several, or on a scale.

A row: ``{"text": "Win money now!", "label": "spam"}``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from peftcli.core.config import AdapterConfig
from peftcli.data.rows import Reader, Row, Table
from peftcli.data.store import Column, Example, Outcome
from peftcli.errors import DataError
from peftcli.models import tokens
from peftcli.tasks import settings
from peftcli.tasks.base import Batch
from peftcli.tasks.classification import LABEL, Classification
from peftcli.tasks.shown import Label, Shown, Text
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.collate import pad_token_id, padded
from peftcli.tasks.text.language_model import tokenizer_fingerprint
from peftcli.tasks.text.token_text import TokenRenderer

_PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
)
_ALONE = ("text", "sentence")
_TRUNCATED = 1


class SequenceClassification(Classification[settings.SequenceClassification]):
    """The task ``sequence_classification``."""

    name = "sequence_classification"
    argument = "text"
    columns: ClassVar = {"input_ids": Column(), "token_type_ids": Column("int8"), "label": LABEL}
    unit = "tokens"
    identity = ("input_ids",)
    flags: ClassVar = {"truncated": _TRUNCATED}

    @property
    def max_length(self) -> int:
        """Tokens of a row at most: the setting, or what the base model can read."""
        positions = getattr(self.base.config.get_text_config(), "max_position_embeddings", None)
        return min(self.settings.max_length, self.processor.model_max_length, positions or self.settings.max_length)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "tokenizer": tokenizer_fingerprint(self.processor),
            "max_length": self.max_length,
            "versions": {name: version(name) for name in ("transformers", "tokenizers")},
        }

    def input_columns(self, table: Table) -> Mapping[str, Sequence[str]]:
        renamed = table.source.columns
        if "text" in renamed or "text_pair" in renamed:
            return {"text": _ALONE} | ({"text_pair": ()} if "text_pair" in renamed else {})
        for one, other in _PAIRS:
            if one in table.columns and other in table.columns:
                return {"text": (one,), "text_pair": (other,)}
        return {"text": _ALONE}

    def encode_inputs(self, rows: Sequence[Row], reader: Reader) -> list[Outcome | DataError]:
        outcomes: list[Outcome | DataError] = []
        for row in rows:
            try:
                texts = [_text(row, reader, column) for column in ("text", "text_pair") if column in reader.names]
            except DataError as error:
                outcomes.append(error)
                continue
            whole = self.processor(*texts, verbose=False)
            size, held = len(whole["input_ids"]), whole
            if size > self.max_length:
                held = self.processor(*texts, truncation=True, max_length=self.max_length)
            if not size:
                outcomes.append(row.place.error("holds no text", key=reader.names["text"]))
                continue
            arrays = {"input_ids": held["input_ids"], "token_type_ids": held.get("token_type_ids", [])}
            example = Example(arrays, len(held["input_ids"]), 1)
            outcomes.append(Outcome([example], size=size, flags=_TRUNCATED * (held is not whole)))
        return outcomes

    def collate_inputs(self, examples: Sequence[Example]) -> Batch:
        rows = [each.arrays["input_ids"] for each in examples]
        batch = {
            "input_ids": padded(rows, pad_token_id(self.processor)),
            "attention_mask": padded([[1] * len(row) for row in rows], 0),
        }
        if len(examples[0].arrays["token_type_ids"]):
            batch["token_type_ids"] = padded([each.arrays["token_type_ids"] for each in examples], 0)
        return batch

    def show(self, example: Example) -> Shown:
        ids = np.asarray(example.arrays["input_ids"]).tolist()
        renderer = TokenRenderer(self.processor)
        text = Text(renderer.render(ids, [IGNORED] * len(ids)), "text")
        return Shown([text, Label(self.label_text(example))], {"input_ids": ids, "text": renderer.text(ids)})

    def probe(self) -> Batch:
        """Two rows of random tokens."""
        config = self.base.config.get_text_config()
        ids = torch.randint(config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def fit_model(self, model: Any, config: AdapterConfig | None) -> list[str]:
        """Give the model rows for new tokens, and a pad token, by which a decoder finds the last token of a row."""
        if config is None:
            tokens.grow_for(model, self.processor, self.base.spec)
        else:
            tokens.make_room(model, self.processor, config, self.base.spec)
        note = tokens.settle_pad(self.processor, model)
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = self.processor.pad_token_id
        return [note] if note else []

    def config_options(self) -> dict[str, Any]:
        return {"pad_token_id": self.processor.pad_token_id}

    def save(self, folder: Path) -> list[str]:
        return super().save(folder) + tokens.save_with_adapter(folder, self.processor, self.base.spec)


def _text(row: Row, reader: Reader, column: str) -> str:
    value = reader.value(row, column)
    if not isinstance(value, str):
        raise row.place.error(f"expected a text, found {value!r:.60}", key=reader.names[column])
    return value


TASK = SequenceClassification
