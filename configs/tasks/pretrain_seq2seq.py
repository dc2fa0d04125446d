"""Pretrain a small encoder-decoder (ByT5's shape) to pronounce English words.

    python configs/tasks/pretrain_seq2seq.py data/pronunciations/english.jsonl models/byt5-english   # 20 minutes

The model reads and writes bytes (https://arxiv.org/abs/2105.13626): a word, and how it sounds in the phonetic alphabet.
A folder that exists is left alone.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

import torch
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

SEED = 0
STEPS = 2500
BATCH = 128
LEARNING_RATE = 3e-3


def main() -> None:
    """Train, and save model and tokenizer."""
    if len(sys.argv) != 3:
        sys.exit("usage: pretrain_seq2seq.py WORDS.jsonl FOLDER")
    folder = Path(sys.argv[2])
    if folder.exists():
        print(f"pretrain: {folder} is there already")
        return
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    tokenizer = ByT5Tokenizer()
    torch.manual_seed(SEED)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=32,
            num_heads=4,
            d_ff=384,
            num_layers=4,
            num_decoder_layers=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            **{
                "tie_word_embeddings": False,
                "decoder_start_token_id": tokenizer.pad_token_id,
                "tokenizer_class": "ByT5Tokenizer",
            },
        )
    )
    train(model, tokenizer, rows)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"pretrain: {model.num_parameters():,} parameters in {folder}")


def train(model: T5ForConditionalGeneration, tokenizer: ByT5Tokenizer, rows: list[dict[str, str]]) -> None:
    """Train the model to write how a word sounds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    draw, started, losses = random.Random(SEED), time.perf_counter(), list[float]()
    for step in range(1, STEPS + 1):
        batch = draw.sample(rows, BATCH)
        words, sounds = (
            tokenizer([row[name] for row in batch], padding=True, return_tensors="pt")
            for name in ("prompt", "completion")
        )
        labels = sounds["input_ids"].masked_fill(sounds["attention_mask"] == 0, -100)  # (B, T)
        loss = model(**words, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0:
            seconds, mean = time.perf_counter() - started, sum(losses[-100:]) / 100
            print(f"pretrain: step {step} of {STEPS}: loss {mean:.3f}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
