"""Features, or packed rows of them -> one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from peftcli.tasks.text.chat import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows up: the pad token's, else EOS's, else 0.

    Which one it is changes nothing: attention mask and labels leave the padding out by position, not by id.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def pad_causal(features: Sequence[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """``input_ids``, ``labels`` and ``attention_mask``, each ``(B, T)``, padded on the right.

    Packed rows get ``position_ids`` in the mask's place, in which padding starts at 0 as one more example does:
    transformers tells examples apart by restarting positions, and only where there is no mask.
    """
    ids = [each["input_ids"] for each in features]
    width = max(map(len, ids))
    batch = {
        "input_ids": _padded(ids, pad_token_id),
        "labels": _padded([each["labels"] for each in features], IGNORED),
    }
    if "position_ids" in features[0]:
        rows = [each["position_ids"] for each in features]
        return batch | {"position_ids": torch.tensor([[*row, *range(width - len(row))] for row in rows])}
    return batch | {"attention_mask": _padded([[1] * len(row) for row in ids], 0)}


def pad_seq2seq(features: Sequence[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` of the sources, ``(B, T)``, and ``labels``, padded to their own length."""
    return pad_causal(features, pad_token_id)


def _padded(rows: list[list[int]], filler: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows], dtype=torch.long)
