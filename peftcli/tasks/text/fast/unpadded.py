"""Batches without their padding, and without what their rows share: a model computes nothing for it, or once.

Tasks pad examples to a batch (B, T). Below the head, the tokens that are no padding stand in one row (1, N), so that
each layer works on N tokens instead of B * T, and attention stays within each example. Where a causal model reads
the same tokens at the start of several examples, a system prompt, a soft prompt, or the prompt of a preferred and a
rejected answer, they stand there once. The hidden states come back as (B, T, D), with zeros where there is padding:
heads and losses notice nothing.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import update_wrapper
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from peftcli.core.config import AdapterConfig
from peftcli.core.prompts.inputs import bound, position_tables, takes
from peftcli.core.prompts.prefix import PrefixAttention
from peftcli.errors import ModelError
from peftcli.models.probe import agrees, probing
from peftcli.tasks.text.fast.segments import ATTENTION, Layout, Segment, borders_of, layout_of_call, set_inside
from peftcli.tasks.text.token_ids import is_half_precision

_WORTHWHILE = 0.95
"""A batch is computed as it is unless the tokens to compute are at most this share; so is what rows share."""
_EXACT, _ROUNDED = 1e-4, 0.3
"""How far a token's hidden states may be off by rounding, in float32 and in less, relative to their spread. Seen over
30 layers were 1e-5 and 0.1; where examples of a trained model saw each other, 0.15 and more."""
_LEAKED = 0.02
"""How far they may be off in less than float32 beside other examples, in a row of the same shape: seen was 0."""
_BY_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids", "visual_pos_masks")
_OF_PICTURES = "deepstack_visual_embeds"
"""What a decoder adds to the tokens of pictures: each has its own, so that rows share none."""
_KNOWN = {*_BY_TOKEN, _OF_PICTURES, "attention_mask", "use_cache", "return_dict", "logits_to_keep"}
_OUTPUTS = ("hidden_states", "attentions", "router_logits")


class UnpaddedBatch(NamedTuple):
    """A batch (B, T) as a row of the N tokens that are computed of it, or as part of such a row."""

    inputs: dict[str, Any]
    """The model's arguments, those by token (1, N)."""
    layout: Layout
    rows: int
    """B"""
    length: int
    """T"""


def unpad(
    model: Any, config: AdapterConfig | None = None, *, try_out: bool = True, probe: Mapping[str, Any] | None = None
) -> bool:
    """Let a model on its device compute no padding, if it can and the outcome is the same. Returns whether it does.

    It does with flash attention and with SDPA.

    Args:
        model: An encoder or a decoder; of another kind, nothing is changed.
        config: Of the adapter in it, if there is one.
        try_out: Whether the model is asked if the outcome is the same; else it is taken to be.
        probe: A padded batch of inputs, on the model's device, that are more than texts: asked of it too.
    """
    if config is not None and config.packing_problem():
        return False
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder or is_unpadded(model):
        return is_unpadded(model)
    inners = [inner for inner in _below_head(model) if _may_keep_apart(inner)]
    name = str(model.config._attn_implementation)
    flash, told = "flash" in name, any(getattr(model.config, f"output_{what}", False) for what in _OUTPUTS)
    able = flash or (name == "sdpa" and model._can_set_attn_implementation())
    if told or not able or not inners:
        return False
    if not flash:
        model.set_attn_implementation(ATTENTION)
    counts = [table.padding_idx + 1 for table in position_tables(model) if table.padding_idx is not None]
    may_share = not flash and (try_out or any(getattr(each, "is_causal", False) for each in model.modules()))
    ways = [
        _Unpadded(inner, max(counts, default=0), flash=flash, shares=shares)
        for inner in inners
        for shares in (True, False)
        if may_share or not shares
    ]
    if try_out:
        ways = list(itertools.islice((way for way in ways if _agree(model.base_model, way, probe)), 1))
    else:  # of two, one within the other, the outer one computes no padding if it can, else the inner one
        ways = [way for way in ways if way.shares == may_share]
    for way in ways:
        way.module.forward = way
    if not ways and not flash:
        model.set_attn_implementation(name)
    return bool(ways)


def _below_head(model: Any) -> list[Any]:
    """Return the modules that may compute no padding: the decoder, and all below the head."""
    return list(dict.fromkeys((model.get_decoder(), model.base_model)))


def _may_keep_apart(inner: Any) -> bool:
    """Return whether a model takes the places of examples in a row, and has no convolution along the row."""
    told = all(takes(inner, argument) for argument in ("position_ids", "attention_mask"))
    return told and not any(isinstance(each, nn.Conv1d) and each.kernel_size != (1,) for each in inner.modules())


def unpadded_part(model: Any) -> Any:
    """Return the module of a model that computes no padding; None: ``unpad`` has not returned true for the model."""
    parts = _below_head(model) if isinstance(model, PreTrainedModel) else []
    return next((part for part in parts if isinstance(getattr(part, "forward", None), _Unpadded)), None)


def is_unpadded(model: Any) -> bool:
    """Return whether ``unpad`` has returned true for a model."""
    return unpadded_part(model) is not None


class _Unpadded:
    """The forward of a model below its head."""

    def __init__(self, module: Any, first: int, *, flash: bool, shares: bool):
        """Wrap the module's own forward.

        Args:
            module: The model below its head.
            first: The position of a row's first token.
            flash: Whether attention tells the examples apart by their positions.
            shares: Whether a token depends on none behind it, so that what examples have in common is computed once.
        """
        self.module, self.forward, self.first, self.flash, self.shares = module, module.forward, first, flash, shares
        parameters = inspect.signature(module.forward).parameters.values()
        self.takes_more = any(each.kind is each.VAR_KEYWORD for each in parameters)
        """Whether the forward passes on to attention what it does not know."""
        self.used = False
        """Whether it has computed a batch without its padding, by the mask that keeps the rows apart."""
        self.instead: Callable[[dict[str, Any]], Any] | None = None
        """What gives the output instead, unless it is None, while several models compute as one; see ``joined``."""
        self.prefix = next((each for each in module.modules() if isinstance(each, PrefixAttention)), None)
        update_wrapper(self, module.forward)  # its arguments are looked up

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = bound(self.forward, args, kwargs)
        if self.instead is not None and (output := self.instead(inputs)) is not None:
            return output
        kept = _kept(inputs)
        layout = None if kept is None else self._layout(inputs, kept)
        if kept is None or layout is None:
            return self.forward(*args, **kwargs)
        part = self._part(inputs, kept, layout)
        output = self.compute([part])
        return self.spread(output, output.last_hidden_state[0], part)

    def part(self, inputs: Mapping[str, Any]) -> UnpaddedBatch:
        """Return a batch as part of a row of several. It computes the same tokens as alone, padding included."""
        kept = _kept(inputs)
        if kept is None:
            raise ModelError("the model is asked for more than its hidden states, or its padding is unknown")
        layout = self._layout(inputs, kept) or (_trimmed if self.flash else _whole)(kept.cpu(), kept.device)
        return self._part(dict(inputs), kept, layout)

    def _part(self, inputs: dict[str, Any], kept: torch.Tensor, layout: Layout) -> UnpaddedBatch:
        rows, length = kept.shape
        if inputs.get("position_ids") is None:
            inputs["position_ids"] = torch.arange(self.first, self.first + length, device=kept.device)[None]
            if self.first and inputs.get("input_ids") is not None:  # the pad token has no place, wherever it stands
                counts = (inputs["input_ids"] != self.first - 1).long()
                inputs["position_ids"] = counts * counts.cumsum(1) + self.first - 1
        for name in _BY_TOKEN:
            if (value := _by_row(name, inputs)) is not None:
                value = value.expand(rows, *value.shape[1:]).flatten(0, 1)[None, layout.computed]
                inputs[name] = value.movedim(-1, 0) if _has_axes(name, value) else value
        return UnpaddedBatch(inputs, layout, rows, length)

    def compute(self, parts: Sequence[UnpaddedBatch]) -> Any:
        """Run the model's own forward over the tokens of several batches as one row."""
        inputs, rows = dict(parts[0].inputs), [row for part in parts for row in part.layout.rows]
        for name in _BY_TOKEN:
            if inputs.get(name) is not None and len(parts) > 1:
                joined = torch.cat([_by_row(name, part.inputs) for part in parts], dim=1)
                inputs[name] = joined.movedim(-1, 0) if _has_axes(name, joined) else joined
        sizes = [len(part.layout.computed) for part in parts]
        everything = torch.arange(sum(sizes), device=parts[0].layout.computed.device)
        places = None
        if any(part.layout.places is not None for part in parts):
            own = zip(everything.split(sizes), parts, strict=True)
            places = torch.cat([one if part.layout.places is None else one[part.layout.places] for one, part in own])
        inputs["attention_mask"] = None if self.flash else torch.ones_like(everything, dtype=torch.bool)[None]
        if self.flash and self.takes_more:  # or each layer finds where examples begin, and waits for the device
            ends, longest = borders_of(rows, everything.device)
            inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        if takes(self.module, "use_cache"):
            inputs["use_cache"] = False
        layout = Layout(everything, None, rows, places)
        with set_inside(layout_of_call, layout):
            output = self.forward(**inputs)
        self.used = self.flash or layout.keeps_apart  # a model may make its mask itself
        return output

    def spread(self, output: Any, states: torch.Tensor, part: UnpaddedBatch) -> Any:
        """Return the model's output for a batch, of whose row it computed the hidden states (N, D)."""
        output.last_hidden_state = _spread(states, part.layout, part.rows, part.length)
        if output.get("pooler_output") is not None:
            pooler = self.module.pooler
            states = output.last_hidden_state.to(next(pooler.parameters()).dtype)  # autocast returns them in float32
            output.pooler_output = pooler(states)
        return output

    def _layout(self, inputs: Mapping[str, Any], kept: torch.Tensor) -> Layout | None:
        """Return the layout of a batch; None: all of it is computed as it is."""
        device, kept = kept.device, kept.cpu()  # or a GPU would be waited for many times
        sizes = kept.sum(1).tolist()
        shares = self.shares and inputs.get(_OF_PICTURES) is None
        shared = _shared(inputs, kept) if shares else [(0, 0)] * len(sizes)
        saved, whole = sum(count for _, count in shared), sum(sizes)
        prefix = self.prefix.count if self.prefix is not None and self.prefix.enabled else 0
        if whole - saved > _WORTHWHILE * kept.numel() or any(count < prefix for _, count in shared[1:]):
            return None
        if not prefix and saved < (1 - _WORTHWHILE) * whole:
            return _trimmed(kept, device)
        source, computed, rows, start = torch.full(kept.shape, whole - saved), kept.clone(), [], 0
        places: list[torch.Tensor] = []
        for at, (size, (parent, count)) in enumerate(zip(sizes, shared, strict=True)):
            source[at, :count] = source[parent, :count]
            source[at, count:size] = torch.arange(start, start + size - count)
            computed[at, :count] = False
            start += size - count
            if count < size:
                rows.append(Segment(count, size))
                places.append(source[at, :size])
        chosen = computed.flatten().nonzero().squeeze(1)
        return Layout(chosen.to(device), source.flatten().to(device), rows, torch.cat(places).to(device))


def _trimmed(kept: torch.Tensor, device: torch.device) -> Layout:
    """The layout in which nothing is shared, and no padding is computed."""
    rows = [Segment(0, size) for size in kept.sum(1).tolist() if size]
    return Layout(kept.flatten().nonzero().squeeze(1).to(device), None, rows, None)


def _whole(kept: torch.Tensor, device: torch.device) -> Layout:
    """The layout in which all is computed as it is. No example sees padding, which stands in rows of its own."""
    sizes = [size for row in kept for size in torch.unique_consecutive(row, return_counts=True)[1].tolist()]
    return Layout(torch.arange(kept.numel(), device=device), None, [Segment(0, size) for size in sizes], None)


def _spread(states: torch.Tensor, layout: Layout, rows: int, length: int) -> torch.Tensor:
    """The hidden states (N, D) as (B, T, D)."""
    if layout.source is not None:
        padded = torch.cat([states, states.new_zeros(1, states.shape[1])])
        return F.embedding(layout.source, padded).view(rows, length, -1)  # an index would add gradients in any order
    spread = states.new_zeros(rows * length, states.shape[1])
    return spread.index_copy(0, layout.computed, states).view(rows, length, -1)


def _shared(inputs: Mapping[str, Any], kept: torch.Tensor) -> list[tuple[int, int]]:
    """For each row of a batch an earlier one that starts alike, and how many tokens they have in common. On the CPU.

    None have where a row is padded on the left.
    """
    if not bool((kept[:, :-1] >= kept[:, 1:]).all()):
        return [(0, 0)] * len(kept)
    given = [value for name in _BY_TOKEN if (value := _by_row(name, inputs)) is not None and len(value) == len(kept)]
    values = [value if value.ndim > kept.ndim else value.cpu() for value in given]
    counts = torch.zeros(len(kept), len(kept), dtype=torch.long)
    for at in range(1, len(kept)):
        same = kept[:at] & kept[at]
        for value in values:
            equal = value[:at] == value[at]
            same &= equal if equal.ndim == same.ndim else equal.all(-1).cpu()
        counts[at, :at] = same.cummin(1).values.sum(1)
    most = counts.max(dim=1)
    return list(zip(most.indices.tolist(), most.values.tolist(), strict=True))


def _has_axes(name: str, value: torch.Tensor) -> bool:
    """Whether these are positions along several axes, as time, height and width of pictures."""
    return name == "position_ids" and value.ndim == 3


def _by_row(name: str, inputs: Mapping[str, Any]) -> Any:
    """An argument (B, T, ...) of a model; positions along several axes (A, B, T) too. None: it is not given."""
    value = inputs.get(name)
    return value.movedim(0, -1) if value is not None and _has_axes(name, value) else value


def _kept(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the mask (B, T) of tokens that are not padding; None: unknown, or more than hidden states is asked for."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or inputs.get("use_cache"):  # or masks made of it
        return None
    other = {name for name, value in inputs.items() if name not in _KNOWN and value is not None and value is not False}
    kept = mask.bool()
    return None if other else kept


def example_lengths(device: torch.device) -> torch.Tensor | None:
    """For each token of the row that a model is called with, how many its example has: (N,). None: it is no such row.

    A token that several examples share is the first one's.
    """
    layout = layout_of_call.get()
    if layout is None:
        return None
    counts = [row.size for row in layout.rows for _ in range(row.size - row.shared)]
    return torch.tensor(counts, device=device)


def _agree(model: Any, unpadded: _Unpadded, probe: Mapping[str, Any] | None) -> bool:
    """Let part of a model compute no padding if it can, and the model then says the same of rows of unequal length.

    So it must whatever stands beside them, and of a ``probe``. Returns whether it does. ``model`` is all below the
    head.

    Leaves the modules' modes and the random state as they were.
    """
    if unpadded.prefix is not None and not unpadded.shares:
        return False
    config, device, inner = model.config.get_text_config(), model.device, unpadded.module
    ids = torch.randint(config.vocab_size, (2, 3, 12), generator=torch.Generator().manual_seed(0)).to(device)
    ids[0, 1, :4] = ids[0, 0, :4]  # which those can share that look at nothing behind
    ids[1, 1], ids[1, 0, :4] = ids[0, 1], ids[0, 0, :4]  # the second row stands beside others
    mask = (torch.arange(12) < torch.tensor([[6], [12], [3]])).long().to(device)
    second = mask * torch.tensor([[0], [1], [0]], device=device)
    if config.pad_token_id is not None:  # which some models take for padding wherever it stands
        ids = torch.where(ids == config.pad_token_id, (ids + 1) % config.vocab_size, ids)
    agree = False
    try:
        options = {"use_cache": False} if takes(model, "use_cache") else {}
        with probing(model, device):
            padded = model(input_ids=ids[0], attention_mask=mask, **options)
            inner.forward = unpadded
            found, beside = (model(input_ids=each, attention_mask=mask, **options) for each in ids)
            same = [(found, padded, mask, _ROUNDED), (found, beside, second, _LEAKED)]
            used = unpadded.used
            if used and probe is not None:
                unpadded.used = False
                alone = model(**probe, **options)
                used, inner.forward = unpadded.used, unpadded.forward
                same.append((alone, model(**probe, **options), probe["attention_mask"], _ROUNDED))
                inner.forward = unpadded
        rounded = is_half_precision(model) or torch.is_autocast_enabled(device.type)
        agree = used and all(
            agrees(one, other, limit if rounded else _EXACT)
            for found, wanted, tokens, limit in same
            for one, other in zip(_said(found, tokens), _said(wanted, tokens), strict=True)
        )
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        pass  # it looks into its mask, or takes other inputs
    finally:
        if not agree:
            inner.forward = unpadded.forward
    return agree


def _said(output: Any, mask: torch.Tensor) -> list[torch.Tensor]:
    """The hidden states of what ``mask`` chooses, and what a pooler makes of each row of it."""
    pooled = output.get("pooler_output")
    states = output.last_hidden_state[mask.bool()].float()
    return [states] if pooled is None else [states, pooled[mask.any(1)].float()]
