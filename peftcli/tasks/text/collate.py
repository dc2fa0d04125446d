"""Collate examples, or packed rows of them, into one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from peftcli.data.store import Example
from peftcli.tasks.text.chat import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that pads rows: the pad token's, else EOS's, else 0.

    The choice changes nothing: attention mask and labels exclude padding by position, not by id.
    """
    tokens = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in tokens if token is not None)


def pad_labelled(examples: Sequence[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad ``input_ids``, ``labels`` and ``attention_mask`` on the right, each ``(B, T)``.

    Packed rows get ``position_ids`` instead of the mask, in which padding restarts at 0 like another example:
    transformers separates examples by restarting positions, and only without a mask.
    """
    batch = pad_texts([each.arrays["input_ids"] for each in examples], pad_token_id)
    batch["labels"] = padded([each.arrays["labels"] for each in examples], IGNORED)
    if "position_ids" in examples[0].arrays:
        width = batch.pop("attention_mask").shape[1]
        rows = [each.arrays["position_ids"] for each in examples]
        filled = [np.concatenate([row, np.arange(width - len(row))]) for row in rows]
        batch["position_ids"] = padded(filled, 0)
    return batch


def pad_texts(rows: Sequence[Sequence[int] | np.ndarray], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad rows of token ids on the right: ``input_ids`` and ``attention_mask``, each (B, T)."""
    mask = padded([np.ones(len(row), np.int64) for row in rows], 0)
    return {"input_ids": padded(rows, pad_token_id), "attention_mask": mask}


def padded(rows: Sequence[Sequence[int] | np.ndarray], filler: int) -> torch.Tensor:
    """Put rows of different lengths into one tensor (B, T), padded on the right."""
    padded = np.full((len(rows), max(map(len, rows))), filler, np.int64)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = row
    return torch.from_numpy(padded)
