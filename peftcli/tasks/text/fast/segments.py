"""Attention within the examples of one row, and the mask that says where they stand.

On a CPU each example is a call of torch's SDPA. On a GPU, where many small calls take longer than what they compute,
all are one: torch's flash attention for examples of any length, or else SDPA over a padded batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "peftcli_unpadded"
"""The name with transformers of SDPA's attention that knows segments."""
_FEW, _SMALL_HEAD = 128, 64
"""On a CPU, attention over so few tokens with heads no larger is faster in float32 than in bfloat16."""
_BLOCK = 1024
"""Number of tokens whose masks are computed at once."""
_MOST_PADDING = 4
"""Attention is padded only if the padded batch has at most this many times as many tokens."""
_AT_ONCE = ("cuda",)
"""Devices that compute all examples in one call."""
_HAS_KERNEL = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether torch's flash attention takes what it is given here, as from 2.12 on."""


class Segment(NamedTuple):
    """An example of a batch in the row of all."""

    shared: int
    """How many of its tokens, from its first one on, are an earlier example's."""
    size: int
    """How many it has."""


@dataclass
class Layout:
    """The N tokens of a batch (B, T) that are computed, and their places."""

    computed: torch.Tensor
    """Places in the flattened batch: (N,)."""
    source: torch.Tensor | None
    """For each place of the batch, which of the N it is; N: none. (B * T,). None: no row shares."""
    rows: list[Segment]
    places: torch.Tensor | None
    """Where the tokens of the rows stand among the N, row after row: (M,). None: in this order."""
    keeps_apart: bool = False
    """Whether the model has asked for the mask by which attention keeps the rows apart."""


layout_of_call: ContextVar[Layout | None] = ContextVar("layout_of_call", default=None)
"""Of the row that a model is called with."""


@contextmanager
def set_inside(variable: ContextVar, value: Any) -> Iterator[None]:
    """Inside, a context variable has another value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@dataclass(frozen=True)
class Segments:
    """A mask for attention example by example."""

    layout: Layout
    causal: bool
    usual_to: int
    """An example of at most this many tokens needs no mask: its attention is full, or causal if ``causal``."""
    sees: torch.Tensor | None
    """Which token of the longest example sees which, (L, L), and so of the others; None: as is usual."""

    @property
    def rows(self) -> list[Segment]:
        """The examples."""
        return self.layout.rows

    @property
    def masks(self) -> list[torch.Tensor | None]:
        """Which token of an example sees which, (n, n). None: as is usual."""
        sees = self.sees
        return [None if sees is None or size <= self.usual_to else sees[:size, :size] for _, size in self.rows]

    @cached_property
    def borders(self) -> tuple[torch.Tensor, int]:
        """The borders of the examples, and the longest."""
        return borders_of(self.rows, self.layout.computed.device)

    @cached_property
    def own(self) -> torch.Tensor:
        """Which of the tokens of all examples, one after another, are no earlier example's: (N,)."""
        own = [place >= shared for shared, size in self.rows for place in range(size)]
        return torch.tensor(own, device=self.layout.computed.device).nonzero().squeeze(1)

    @cached_property
    def padded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The examples as a batch: which token stands where (R * L,), which places are tokens, and who sees whom."""
        device, longest = self.layout.computed.device, self.borders[1]
        sizes = torch.tensor([row.size for row in self.rows], device=device)
        kept = torch.arange(longest, device=device) < sizes[:, None]
        tokens = torch.zeros_like(kept, dtype=torch.long)  # what stands behind an example is seen by none of it
        places = self.layout.places
        tokens[kept] = torch.arange(int(kept.sum()), device=device) if places is None else places
        seen = None if self.sees is None else self.sees[None, None]
        if not self.causal:
            seen = kept[:, None, None] if seen is None else seen & kept[:, None, None]
        return tokens.flatten(), kept.flatten().nonzero().squeeze(1), seen


def borders_of(rows: Sequence[Segment], device: torch.device) -> tuple[torch.Tensor, int]:
    """Return the borders of adjacent examples, as flash attention wants them: (R + 1,) in int32, and the longest."""
    sizes = [row.size for row in rows]
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device), max(sizes)


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
        return _attend(module, query, key, value, attention_mask, **settings), None
    settings["is_causal"] = attention_mask.causal
    compute = _at_once if query.device.type in _AT_ONCE else _one_by_one
    return compute(module, query, key, value, attention_mask, **settings), None


def _one_by_one(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, **settings: Any
) -> torch.Tensor:
    """Attention by a call for each example: (1, N, heads, head size)."""
    rows, places = segments.rows, segments.layout.places
    sizes = [row.size for row in rows]
    given = (each if places is None else each.index_select(2, places) for each in (query, key, value))
    parts = [each.split(sizes, dim=2) for each in given]
    found = []
    for row, mask, q, k, v in zip(rows, segments.masks, *parts, strict=True):
        attended = _attend(module, q, k, v, None if mask is None else mask[None, None], **settings)
        found.append(attended[:, row.shared :])
    return torch.cat(found, dim=1)


def _at_once(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, **settings: Any
) -> torch.Tensor:
    """Attention by one call for all examples: (1, N, heads, head size)."""
    places, found = segments.layout.places, None
    if segments.sees is None and not settings.get("dropout"):
        q, k, v = (each if places is None else _taken(each, places) for each in (query, key, value))
        found = _by_kernel(q, k, v, segments, settings.get("scaling"))
    if found is None and len(segments.rows) * segments.borders[1] > _MOST_PADDING * query.shape[2]:
        return _one_by_one(module, query, key, value, segments, **settings)
    if found is None:
        tokens, kept, seen = segments.padded
        q, k, v = (_taken(each, tokens, len(segments.rows)) for each in (query, key, value))
        found = _attend(module, q, k, v, seen, **settings).flatten(0, 1).index_select(0, kept)[None]
    return found if places is None else found.index_select(1, segments.own)


def _by_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scaling: float | None
) -> torch.Tensor | None:
    """Attention by torch's flash attention, (1, M, heads, head size). None: it cannot."""
    if not _HAS_KERNEL or query.shape[-1] % 8:
        return None
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    q, k, v = (each.to(dtype) for each in (query, key, value))
    groups = q.shape[1] != k.shape[1]
    if not can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, segments.causal, groups)):
        return None
    (ends, longest), window = segments.borders, (-1, 0 if segments.causal else -1)
    q, k, v = (each[0].transpose(0, 1) for each in (q, k, v))
    found = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=window, enable_gqa=groups)
    assert isinstance(found, torch.Tensor)  # a pair where more is asked for
    return found[None]


def _taken(each: torch.Tensor, places: torch.Tensor, rows: int = 1) -> torch.Tensor:
    """Of (1, heads, N, head size) the tokens at places (R * L,): (R, heads, L, head size)."""
    tokens = each[0].transpose(0, 1)
    taken = F.embedding(places.view(rows, -1), tokens.flatten(1))  # a GPU would add an index's gradients in any order
    return taken.unflatten(2, tokens.shape[1:]).transpose(1, 2)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **settings: Any,
) -> torch.Tensor:
    few = key.shape[2] <= _FEW and key.shape[3] <= _SMALL_HEAD and (mask is None or mask.dtype == torch.bool)
    narrow = value.dtype == torch.bfloat16 and value.device.type == "cpu"  # the others too, or under autocast
    if not (few and narrow):
        found, _ = sdpa_attention_forward(module, query, key, value, mask, **settings)
        return found
    with torch.autocast("cpu", enabled=False):
        found, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **settings)
    return found.to(value.dtype)


def mask(*, mask_function: Callable, use_vmap: bool = False, **settings: Any) -> torch.Tensor | Segments | None:
    """The segments of a row of examples; for other inputs SDPA's mask. Settings differ by transformers' version."""
    layout = layout_of_call.get()
    if layout is None or use_vmap:
        return sdpa_mask(mask_function=mask_function, use_vmap=use_vmap, **settings)
    places = torch.arange(max(row.size for row in layout.rows), device=layout.computed.device)

    def sees(tokens: torch.Tensor) -> torch.Tensor:
        found = torch.as_tensor(mask_function(places[0], places[0], tokens[:, None], places))  # whatever the segment
        return found.expand(len(tokens), len(places))

    facts = []
    for tokens in places.split(_BLOCK):  # of a long example, all at once are gigabytes
        found, before = sees(tokens), places <= tokens[:, None]
        ahead, hidden = found & ~before, before & ~found
        facts.append(torch.stack([ahead.any().long(), _first(ahead | hidden, tokens), _first(~found, tokens)]))
    looks, unlike_causal, unlike_all = torch.stack(facts, dim=1).tolist()  # read at once, since a GPU is waited for
    causal = not any(looks)
    if not causal and any(row.shared for row in layout.rows):
        raise ValueError("what rows have in common depends on what follows it")
    layout.keeps_apart = True
    usual_to = min(unlike_causal if causal else unlike_all)
    return Segments(layout, causal, usual_to, None if usual_to >= len(places) else sees(places))


def _first(unusual: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """How many tokens an example may have so that it holds nothing of the rows (Q, L) of Q tokens that is unusual."""
    found = torch.where(unusual.any(1), torch.maximum(tokens, unusual.byte().argmax(1)), unusual.shape[1])
    return found.min()


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, mask)
