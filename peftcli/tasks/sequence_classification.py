"""Sequence classification: put a text, or a pair of texts, into a class, into several, or on a scale.

A row: ``{"text": "Win money now!", "label": "spam"}``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from peftcli.data.rows import Reader, Row, Table
from peftcli.data.store import Example, Outcome
from peftcli.tasks import PAIRS, settings
from peftcli.tasks.classification import LABEL, Classification
from peftcli.tasks.shown import Label, Shown, Text
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.inputs import TextInputs
from peftcli.tasks.text.token_text import TokenRenderer

_ALONE = ("text", "sentence")
_TRUNCATED = 1


class SequenceClassification(TextInputs, Classification[settings.SequenceClassificationSettings]):
    """The task ``sequence_classification``."""

    name = "sequence_classification"
    arguments = ("text",)
    columns: ClassVar = {**TextInputs.text_columns, "label": LABEL}
    shares = ("text",)
    flags: ClassVar = {"truncated": _TRUNCATED}

    def input_columns(self, table: Table) -> Mapping[str, Sequence[str]]:
        renamed = table.source.columns
        if "text" in renamed or "text_pair" in renamed:
            return {"text": _ALONE} | ({"text_pair": ()} if "text_pair" in renamed else {})
        for one, other in (("text", "text_pair"), *PAIRS):
            if one in table.columns and other in table.columns:
                return {"text": (one,), "text_pair": (other,)}
        return {"text": _ALONE}

    def encode_inputs(self, row: Row, reader: Reader) -> Outcome:
        columns = [column for column in ("text", "text_pair") if column in reader.names]
        texts = [reader.text(row, column) for column in columns]
        for column, text in zip(columns, texts, strict=True) if self.base.config.is_encoder_decoder else ():
            if self.processor.eos_token_id in self.processor(text, add_special_tokens=False)["input_ids"]:
                message = f"holds {self.processor.eos_token}, by which the model finds the end of a text"
                raise row.place.error(message, key=reader.names[column], hint="Remove it from the text.")
        whole = self.processor(*texts, verbose=False)
        size, held = len(whole["input_ids"]), whole
        if not size:
            raise row.place.error("holds no text", key=reader.names["text"])
        if size > self.max_length:
            held = self.processor(*texts, truncation=True, max_length=self.max_length)
        arrays = {"input_ids": held["input_ids"], "token_type_ids": held.get("token_type_ids", [])}
        example = Example(arrays, len(held["input_ids"]), 1)
        return Outcome([example], size=size, flags=_TRUNCATED * (held is not whole))

    def show(self, example: Example) -> Shown:
        ids = np.asarray(example.arrays["input_ids"]).tolist()
        renderer = TokenRenderer(self.processor)
        text = Text(renderer.render(ids, [IGNORED] * len(ids)), "text")
        return Shown([text, Label(self.label_text(example))], {"input_ids": ids, "text": renderer.text(ids)})


TASK = SequenceClassification
