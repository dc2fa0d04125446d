"""Attention of packed rows: each example by itself, instead of a mask over all pairs of tokens in the row.

Registered with transformers under the name ``peftcli_packed``. Ten examples in a row of 2,048 tokens take a twentieth
of the products that a mask needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "peftcli_packed"


@dataclass(frozen=True)
class Segments:
    """A mask of blocks along the diagonal: attention does not cross their borders."""

    sizes: list[int]
    """Tokens of each, one after another."""
    masks: list[torch.Tensor | None]
    """Which token of a segment sees which, (n, n). None: each sees those before it and itself."""


def use_segments(model: Any) -> None:
    """Let the model attend within segments wherever rows are packed, if it can and gains by it: on a CPU, with SDPA.

    A model can when it hands on a mask that is no tensor, as it does flex attention's.
    """
    known = "q_length" in inspect.signature(sdpa_mask).parameters  # what ``mask`` is called with, by newer transformers
    able = known and getattr(model, "_supports_flex_attn", False) and model._can_set_attn_implementation()
    if able and model.config._attn_implementation == "sdpa" and model.device.type == "cpu":
        model.set_attn_implementation(PACKED)


def takes_one_row(model: Any) -> bool:
    """Whether packed examples reach the model as one long row: it then pads nothing, and separates them exactly.

    Flash attention separates them only there.
    """
    name = str(model.config._attn_implementation)
    return name == PACKED or "flash" in name


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Segments | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA's attention of (B, heads, T, head size), by segments where there are any, as (B, T, heads, head size)."""
    if not isinstance(attention_mask, Segments):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    settings["is_causal"] = True  # where a segment has no mask of its own
    split = [each.split(attention_mask.sizes, dim=2) for each in (query, key, value)]
    attended = [
        sdpa_attention_forward(module, q, k, v, mask if mask is None else mask[None, None], **settings)[0]
        for q, k, v, mask in zip(*split, attention_mask.masks, strict=True)
    ]
    return torch.cat(attended, dim=1), None


def mask(
    batch_size: int, q_length: int, kv_length: int, mask_function: Callable, use_vmap: bool = False, **settings: Any
) -> torch.Tensor | Segments | None:
    """The segments of one packed row; for other inputs SDPA's mask.

    A segment begins where a token does not see the one before it.
    """
    plain = settings.get("allow_is_causal_skip", True) or use_vmap or settings.get("attention_mask") is not None
    if plain or batch_size > 1 or q_length != kv_length:
        return sdpa_mask(batch_size, q_length, kv_length, mask_function=mask_function, use_vmap=use_vmap, **settings)
    zero = torch.zeros((), dtype=torch.long, device=settings.get("device", "cpu"))

    def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(mask_function(zero, zero, query, key))

    places = torch.arange(q_length, device=zero.device)
    starts = (~sees(places[1:], places[:-1])).nonzero().flatten() + 1
    sizes = torch.diff(starts, prepend=zero[None], append=zero[None] + q_length).tolist()
    masks: list[torch.Tensor | None] = []
    for segment in places.split(sizes):
        allowed = sees(segment[:, None], segment[None, :])
        masks.append(None if torch.equal(allowed, torch.ones_like(allowed).tril()) else allowed)
    return Segments(sizes, masks)


AttentionInterface.register(PACKED, attend)
AttentionMaskInterface.register(PACKED, mask)
