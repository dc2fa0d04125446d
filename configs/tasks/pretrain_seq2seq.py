"""Pretrain a small encoder-decoder (ByT5's shape) to pronounce English words.

    python configs/tasks/pretrain_seq2seq.py data/pronunciations/english.jsonl models/byt5-english   # 20 minutes

The model reads and writes bytes (https://arxiv.org/abs/2105.13626): a word, and how it sounds in the phonetic alphabet.
A folder that exists is left alone.
"""

from __future__ import annotations

import json
import random
import sys
from functools import partial
from pathlib import Path

import torch
from transformers import ByT5Tokenizer

from peftcli.demos.pretrain import fit
from peftcli.demos.pretrain_dates import loss_of, untrained

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
    tokenizer, draw = ByT5Tokenizer(), random.Random(SEED)
    torch.manual_seed(SEED)
    model = untrained(tokenizer, d_model=128, d_kv=32, d_ff=384, num_layers=4, tie_word_embeddings=False)

    def loss() -> torch.Tensor:
        batch = draw.sample(rows, BATCH)
        return loss_of(model, tokenizer, *([row[name] for row in batch] for name in ("prompt", "completion")))

    fit(model.parameters(), loss, STEPS, LEARNING_RATE, tell=partial(print, "pretrain:", flush=True))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"pretrain: {model.num_parameters():,} parameters in {folder}")


if __name__ == "__main__":
    main()
