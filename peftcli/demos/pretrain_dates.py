"""A small T5 that writes English dates as 2024-03-09. It reads and writes bytes, as ByT5 does."""

from __future__ import annotations

import random
from pathlib import Path

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
    options = {"decoder_start_token_id": tokenizer.pad_token_id, "tokenizer_class": "ByT5Tokenizer"}
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=64,
            d_kv=16,
            num_heads=4,
            d_ff=128,
            num_layers=2,
            num_decoder_layers=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            **options,
        )
    )

    def loss() -> torch.Tensor:
        days = [any_day(draw) for _ in range(_BATCH)]
        asked = tokenizer([english_date(day, draw) for day in days], padding=True, return_tensors="pt")
        labels = tokenizer([day.isoformat() for day in days], return_tensors="pt")["input_ids"]  # equally long
        return model(**asked, labels=labels).loss

    fit(model.parameters(), loss, _STEPS, _RATE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
