"""Texts as the inputs of models with a head: what the tasks share that are not language models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from peftcli.core.config import AdapterConfig
from peftcli.core.prompts.config import max_positions
from peftcli.data.store import Column, Example
from peftcli.errors import ModelError
from peftcli.models import tokens
from peftcli.models.open import OpenBase
from peftcli.tasks.base import Batch
from peftcli.tasks.text.language_model import fit_tokens, tokenizer_fingerprint
from peftcli.tasks.text.token_ids import pad_texts, pad_token_id, padded


class TextInputs:
    """Mixed into a ``Task`` whose settings have ``max_length``, and whose examples have these columns."""

    text_columns: ClassVar = {"input_ids": Column(), "token_type_ids": Column("int8")}
    unit = "tokens"
    identity: ClassVar[Sequence[str]] = ("input_ids",)
    versions: ClassVar[Sequence[str]] = ("transformers", "tokenizers")

    settings: Any
    processor: Any
    base: OpenBase
    virtual_tokens: int
    write_task: Callable[..., str]

    @property
    def max_length(self) -> int:
        """Tokens of a row at most: the setting, or what the base model can read."""
        positions = max_positions(self.base.config.get_text_config(), self.virtual_tokens)
        return min(self.settings.max_length, self.processor.model_max_length, positions or self.settings.max_length)

    def fingerprint(self) -> dict[str, Any]:
        return {"tokenizer": tokenizer_fingerprint(self.processor), "max_length": self.max_length}

    def collate_inputs(self, examples: Sequence[Example]) -> Batch:
        """Pad on the right: ``input_ids``, ``attention_mask`` and, where the model has them, ``token_type_ids``."""
        rows = [each.arrays["input_ids"] for each in examples]
        batch = pad_texts(rows, pad_token_id(self.processor))
        if len(examples[0].arrays["token_type_ids"]):
            batch["token_type_ids"] = padded([each.arrays["token_type_ids"] for each in examples], 0)
        return batch

    def probe(self) -> Batch:
        """Two rows of random tokens; those of encoder-decoders end with the one by which a head finds the end."""
        config = self.base.config.get_text_config()
        size = getattr(config, "vocab_size", len(self.processor))  # CANINE reads letters, and has no table of tokens
        ids = torch.randint(size, (2, 16), generator=torch.Generator().manual_seed(0))
        if self.base.config.is_encoder_decoder:
            end = self.processor.eos_token_id
            ids[ids == end] = end - 1 if end else 1
            ids[:, -1] = end
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def fit_model(self, model: Any, config: AdapterConfig | None) -> list[str]:
        """Give the model rows for new tokens, and a pad token, by which a decoder finds the last token of a row."""
        notes = fit_tokens(model, self.processor, config, self.base.spec)
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = self.processor.pad_token_id
        finds_end = model.config.is_encoder_decoder and type(model).__name__.endswith("ForSequenceClassification")
        if finds_end and self.processor.pad_token_id == model.config.eos_token_id:
            message = "finds a text by the token that ends it, with which its tokenizer pads too"
            raise ModelError(message, key="base_model", hint="give the tokenizer a pad token of its own")
        if hasattr(model, "sequence_summary") and model.config.summary_type == "last":
            message = "reads a text at the last position of its row, where shorter texts of a batch have padding"
            raise ModelError(message, key="base_model", hint="choose another base model for this task")
        return notes

    def save(self, folder: Path) -> list[str]:
        options = {"pad_token_id": self.processor.pad_token_id}  # what a reader must set in the base model's config
        own = self.write_task(folder, settings=self.settings, config=options)
        return [own, *tokens.save_with_adapter(folder, self.processor, self.base.spec)]
