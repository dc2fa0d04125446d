"""The layer of LLaMA-Adapter (https://arxiv.org/abs/2303.16199) over an attention module.

The attention itself is run twice more: over the trained vectors, for their keys and values, and over the input, with
these in the place of its own. So each family's heads, norms, rotation and scaling are right by themselves.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer, adapter_dtype, base_module
from peftcli.core.linear import linear_view
from peftcli.core.prompts.inputs import bound, hook_once, starts, takes, tokens_of
from peftcli.core.prompts.prefix import CACHE, MASK, find_attention, keeps_keys
from peftcli.core.targets import find_modules
from peftcli.errors import AdapterError
from peftcli.methods._delta import layers_of_kind
from peftcli.methods.adaption_prompt import AdaptionPromptConfig

_NO_MASK = ("flash", "flex", "paged")
"""Parts of the names of implementations of attention that do not take a tensor as mask."""
_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj", "o")
"""What an attention module calls its output layer. One without has it outside."""


class AdaptedAttention(AdapterLayer):
    """``y = attention(x) + gate * O softmax(q K(P)) V(P)`` with ``P: (1, n, D)``; ``gate: (1,)`` starts at zero.

    The queries ``q`` are those of the attention, rotated and all. The keys ``K(P)`` have no position. In GPT-2 the term
    is added behind ``O``, as PEFT does.
    """

    by_row = False

    def __init__(self, module: nn.Module, name: str, config: AdaptionPromptConfig):
        attention, count = base_module(module), config.adapter_len
        arguments = inspect.signature(attention.forward).parameters
        view = next((view for child in attention.children() if (view := linear_view(child))), None)
        if not keeps_keys(attention) or view is None:
            kind = type(attention).__name__
            raise AdapterError(
                f"{name} is a {kind}; LLaMA-Adapter adapts attention that gives its keys and values to a cache",
                key="target_modules",
            )
        assert count is not None
        super().__init__(module)
        like = next(itertools.chain(attention.parameters(), attention.buffers()))
        factory: dict[str, Any] = {"device": like.device, "dtype": adapter_dtype(like)}
        self.adaption_prompt = nn.Parameter(torch.randn(1, count, view.in_features, **factory))
        self.adaption_gate = nn.Parameter(torch.zeros(1, **factory))
        self._cache = next(one for one in CACHE if one in arguments)
        self._mask = next(one for one in MASK if one in arguments)
        self._biases = {"position_bias"} & arguments.keys()  # T5's first layer makes it for the others

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        if not self.enabled:
            return output
        attention = base_module(self)
        inputs = bound(attention.forward, args, kwargs)
        x = inputs["hidden_states"]
        prompt = self.adaption_prompt.to(x.dtype)
        fused = linear_view(attention.c_attn) if hasattr(attention, "c_attn") else None
        is_gpt2 = fused is not None and fused.out_features == 3 * fused.in_features
        seen = _attend_fused(attention, x, prompt) if is_gpt2 else self._attend(inputs, prompt)
        seen = self.adaption_gate.to(seen.dtype) * seen
        return (output[0] + seen, *output[1:]) if isinstance(output, tuple) else output + seen

    def _attend(self, inputs: dict[str, Any], prompt: torch.Tensor) -> torch.Tensor:
        """Return what the attention gives where it sees ``prompt`` (1, n, D) only: (B, T, D)."""
        attention, x = base_module(self), inputs["hidden_states"]
        how = getattr(getattr(attention, "config", None), "_attn_implementation", "eager")
        if any(part in how for part in _NO_MASK):
            raise AdapterError(f"LLaMA-Adapter does not work with attn_implementation {how}; set sdpa or eager")
        keeper = _Keeper()
        attention(**_without_positions(inputs, prompt, prompt, self._biases) | {self._cache: keeper, self._mask: None})
        if keeper.kept is None:
            raise AdapterError(f"{type(attention).__name__} gives its keys to no cache; LLaMA-Adapter needs them")
        # without a mask, the first tokens would not see all; XGLM wants one of each row
        mask = x.new_zeros(1, 1, x.shape[1], prompt.shape[1]).expand(len(x), -1, -1, -1)
        if getattr(inputs.get("position_bias"), "ndim", None) == 3:  # MPT, whose mask says what is hidden
            mask = None
        given = {"position_embeddings", "position_ids", "sinusoidal_pos"} & inputs.keys()  # the queries have theirs
        changed = _without_positions(inputs, x, prompt, self._biases) | {name: inputs[name] for name in given}
        training, attention.training = attention.training, False  # the term has no dropout of its own
        try:
            found = attention(**changed | {self._cache: _Keeper(keeper.kept, len(x)), self._mask: mask})
        finally:
            attention.training = training
        seen: torch.Tensor = found[0] if isinstance(found, tuple) else found
        last = next((getattr(attention, name) for name in _OUTPUT if hasattr(attention, name)), None)
        bias = getattr(base_module(last), "bias", None) if last is not None else None
        return seen if bias is None else seen - bias.to(seen.dtype)


class _Keeper:
    """A cache for one call of an attention module: keeps its keys and values, or gives it others."""

    def __init__(self, kept: tuple[torch.Tensor, torch.Tensor] | None = None, rows: int = 1):
        self.kept, self.gives, self.rows = kept, kept is not None, rows

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the keys and values (B, heads, n, dim) that the attention module computes its product with."""
        if not self.gives:
            self.kept = keys, values
        assert self.kept is not None
        return tuple(each.expand(self.rows, -1, -1, -1) for each in self.kept)

    def get_seq_length(self, *args: Any) -> int:
        return 0


def _without_positions(
    inputs: Mapping[str, Any], x: torch.Tensor, prompt: torch.Tensor, biases: set[str]
) -> dict[str, Any]:
    """Return the arguments of the attention for ``x`` and the keys of ``prompt``, with nothing that depends on a place.

    Positions are all 0, by which nothing is rotated, and what is added to scores and outputs is 0. ``biases`` are
    arguments that are given even if the model leaves them to the attention.
    """
    length, count = x.shape[1], prompt.shape[1]
    shape = (1,) * (getattr(inputs.get("position_bias"), "ndim", 4) - 2)
    none: dict[str, Any] = {
        "position_ids": torch.zeros(1, length, dtype=torch.long, device=x.device),
        "position_bias": x.new_zeros(*shape, length, count),
        "alibi": x.new_zeros(1, 1, count),
        "residual": x.new_zeros(1),
    }
    if (rotation := inputs.get("position_embeddings")) is not None:
        if not isinstance(rotation, tuple) or rotation[0].is_complex():
            raise AdapterError("LLaMA-Adapter does not know this model's kind of position embeddings")
        cos, sin = (
            each.new_full((1, length, each.shape[-1]), value) for each, value in zip(rotation, (1, 0), strict=True)
        )
        none["position_embeddings"] = cos, sin
    if (sines := inputs.get("sinusoidal_pos")) is not None:  # of RoFormer: sines, then cosines
        none["sinusoidal_pos"] = torch.cat(
            [sines.new_full((1, 1, length, sines.shape[-1] // 2), one) for one in (0, 1)], -1
        )
    given = {name for name, value in inputs.items() if value is not None} | biases
    return {**inputs, "hidden_states": x, **{name: value for name, value in none.items() if name in given}}


def _attend_fused(attention: Any, x: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """``_attend`` for GPT-2's attention, before its output layer: (B, T, D)."""
    heads = (-1, attention.head_dim)
    query = attention.c_attn(x).chunk(3, -1)[0].unflatten(-1, heads).transpose(1, 2)
    keys, values = (part.unflatten(-1, heads).transpose(1, 2) for part in attention.c_attn(prompt).chunk(3, -1)[1:])
    scores = query @ keys.transpose(2, 3) / math.sqrt(attention.head_dim)
    return (scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values).transpose(1, 2).flatten(2)


wrap = AdaptedAttention


def targets(model: Any, config: AdaptionPromptConfig) -> list[str]:
    """Return the names of the attention modules of the last layers; the config then has their name."""
    wanted, count = config.target_modules, config.adapter_layers
    assert count is not None
    names = find_attention(model).names if wanted is None else find_modules(model, [wanted], "target_modules")
    if len(names) < count:
        raise AdapterError(f"is {count}; the model has {len(names)} layers with attention", key="adapter_layers")
    config.target_modules = wanted or names[-1].rpartition(".")[2]
    return names[-count:]


def attach(model: Any, config: AdaptionPromptConfig, layers: Mapping[str, AdapterLayer]) -> None:
    """Count positions from where left padding ends: how a token sees the vectors depends on its own position."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if any(
        takes(base_module(layer), name) for layer in layers.values() for name in ("position_embeddings", "position_ids")
    ):
        hook_once(decoder, _count_positions)


def _count_positions(decoder: Any, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]] | None:
    """The decoder's forward pre-hook, which serves every adapter and those of copies."""
    if not any(layer.enabled for layer in layers_of_kind(decoder, AdaptedAttention).values()):
        return None
    inputs = bound(decoder.forward, args, kwargs)
    mask = inputs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or inputs.get("position_ids") is not None:
        return None
    place = (torch.arange(mask.shape[1], device=mask.device) - starts(mask)).clamp(min=0)
    return (), inputs | {"position_ids": place[:, -tokens_of(inputs).shape[1] :]}
