"""A small T5 that writes English dates as 2024-03-09. It reads and writes bytes, as ByT5 does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

from peftcli.demos.bookings import SEED
from peftcli.demos.pretrain import fit
from peftcli.demos.texts import any_day, english_date

_STEPS, _BATCH, _RATE = 400, 48, 4e-3


def make(scratch: Path, folder: Path) -> None:
    """Train the model, and save it with its tokenizer."""
    tokenizer, draw = ByT5Tokenizer(), random.Random(SEED)
    torch.manual_seed(SEED)
    model = untrained(tokenizer, d_model=64, d_kv=16, d_ff=128, num_layers=2)

    def loss() -> torch.Tensor:
        days = [any_day(draw) for _ in range(_BATCH)]
        return loss_of(model, tokenizer, [english_date(day, draw) for day in days], [day.isoformat() for day in days])

    fit(model.parameters(), loss, _STEPS, _RATE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def untrained(tokenizer: ByT5Tokenizer, **sizes: Any) -> T5ForConditionalGeneration:
    """Return a small T5 for ByT5's tokenizer, of the ``sizes`` of its config."""
    options = {"decoder_start_token_id": tokenizer.pad_token_id, "tokenizer_class": "ByT5Tokenizer"}
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            num_heads=4,
            num_decoder_layers=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            **options,
            **sizes,
        )
    )


def loss_of(
    model: T5ForConditionalGeneration, tokenizer: ByT5Tokenizer, prompts: Sequence[str], completions: Sequence[str]
) -> torch.Tensor:
    """Return the mean loss of the completions."""
    asked, wanted = (tokenizer([*texts], padding=True, return_tensors="pt") for texts in (prompts, completions))
    labels = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, -100)  # (B, T)
    return model(**asked, labels=labels).loss
