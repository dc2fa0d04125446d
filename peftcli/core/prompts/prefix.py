"""A prefix: trained keys and values that every attention layer sees before its own.

Virtual tokens are put into the decoder's inputs as in ``virtual_tokens``, and each attention layer replaces what it
computed of them by the trained keys and values. To masks, positions and every kind of cache they are ordinary tokens;
they stand after a row's left padding. What comes out for them is cut off again, so nothing above the decoder sees them.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftcli.core.layer import adapter_dtype, base_module, base_modules, name_in
from peftcli.core.linear import linear_view
from peftcli.core.prompts.config import PrefixConfig
from peftcli.core.prompts.inputs import (
    SoftPrompt,
    active_at,
    bound,
    cached_length,
    continued,
    hook_once,
    inserted,
    set_positions,
    starts,
    tokens_of,
    without,
)
from peftcli.core.prompts.virtual_tokens import VirtualTokens, generates, input_embedding_name
from peftcli.errors import AdapterError

CACHE = ("cache", "past_key_values", "past_key_value", "layer_past")
"""What an attention layer calls its cache, by model and by version of transformers."""
MASK = ("attention_mask", "mask")
"""The same of its mask."""
_SIZE = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
"""What an attention layer calls the size of a head. Layers of other kinds, with states of their own, have none."""
_KEEPING = {"full_attention", "sliding_attention", "chunked_attention", "reference_sliding_attention", "attention"}
"""Kinds of layers, as a config's ``layer_types`` names them, whose whole state is keys and values."""


class Prefix(nn.Module):
    """The keys and values of all layers, which share this module."""

    def __init__(self, count: int, pairs: int, width: int):
        super().__init__()
        self.count, self.pairs, self.width = count, pairs, width
        self.start: torch.Tensor | None = None
        """While the decoder starts sequences: where the prefix starts in each row (B, 1)."""
        self.cuts = False
        """Whether the outputs at its positions are removed again."""

    def pair(self, index: int) -> torch.Tensor:
        """Return a layer's keys, followed by its values: (n, 2 * width)."""
        raise NotImplementedError

    def whole(self) -> torch.Tensor:
        """Return the tensor of the adapter file: (n, pairs * 2 * width)."""
        return torch.cat([self.pair(index) for index in range(self.pairs)], dim=1)

    def parts(self) -> list[torch.Tensor]:
        """Return the parameters whose rows are those of ``whole``; none where a network computes it."""
        return []

    def fill(self, values: torch.Tensor) -> None:
        """Copy ``values``, as ``whole`` returns them, into the ``parts``.

        Raises:
            AdapterError: there are none.
        """
        if not (parts := self.parts()):
            raise AdapterError("a network makes this prefix; leave prefix_projection out", key="prefix_projection")
        for part, rows in zip(parts, values.split([len(part) for part in parts]), strict=True):
            part.copy_(rows)


class TrainedPrefix(Prefix):
    """Keys and values that train as they are."""

    def __init__(self, count: int, pairs: int, width: int):
        super().__init__(count, pairs, width)
        self.prompt_embeddings = nn.Parameter(torch.randn(count, pairs * 2 * width))

    def pair(self, index: int) -> torch.Tensor:
        return self.prompt_embeddings[:, index * 2 * self.width : (index + 1) * 2 * self.width]

    def whole(self) -> torch.Tensor:
        return self.prompt_embeddings

    def parts(self) -> list[torch.Tensor]:
        return [self.prompt_embeddings]


class PrefixAttention(SoftPrompt):
    """A self-attention layer that sees the prefix."""

    decodes = True
    chunks = False
    prefix: Prefix

    def __init__(self, base_layer: nn.Module, pair: int, heads: int):
        super().__init__(base_layer)
        self.pair, self.heads = pair, heads
        arguments = inspect.signature(base_module(base_layer).forward).parameters
        self._cache = next(name for name in CACHE if name in arguments)
        self._mask = next(name for name in MASK if name in arguments)
        self._true_hides: bool | None = None  # whether a mask of truth values hides what is true, as MPT's does

    def file_name(self, path: str, tensor: str) -> str:
        return tensor.removeprefix("prefix.")

    def file_tensors(self) -> dict[str, torch.Tensor]:
        return {"prompt_embeddings": self.prefix.whole()}

    def parts(self, tensor: str, value: torch.Tensor) -> list[torch.Tensor]:
        return self.prefix.parts() or [value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        batch, length = (args[0] if args else kwargs["hidden_states"]).shape[:2]
        later, borrows = length <= self.count, vars(base_module(self)).get("is_kv_shared_layer")
        if not self.enabled or later or borrows:  # keys of another layer have the prefix already
            return self.base_layer(*args, **kwargs)
        inputs = bound(base_module(self).forward, args, kwargs)
        cache = inputs.get(self._cache)
        cache = getattr(cache, "self_attention_cache", cache)
        if cache is not None and cache.get_seq_length(base_module(self).layer_idx):
            return self.base_layer(*args, **kwargs)
        given = _WithPrefix(cache, self, self._start(inputs.get(self._mask), batch, length))
        output = self.base_layer(**inputs | {self._cache: given})
        if given.length != length:
            raise AdapterError(
                "the method needs attention that gives the keys and values of all its tokens to a cache; "
                f"{type(base_module(self)).__name__} does not",
                hint="choose another method, such as lora",
            )
        return output

    def _start(self, mask: Any, batch: int, length: int) -> torch.Tensor:
        """Return where the prefix starts in each row (B, 1).

        When checkpointing calls the layer again, perhaps after other batches, its own mask is read.
        """
        start = self.prefix.start
        if start is None and (mask is None or hasattr(mask, "rows")):
            return torch.zeros(batch, 1, dtype=torch.long)
        if start is None:
            return _start_in(mask, length, bool(self._true_hides)).expand(batch, 1)
        if self.training and self._true_hides is None and getattr(mask, "dtype", None) is torch.bool:
            self._true_hides = not bool((_start_in(mask, length, False) == start).all())
        return start[:batch]  # a row of several examples has one prefix, before all of them


class _WithPrefix:
    """A cache for one call of one attention layer, which puts the prefix into what it is given.

    Attention layers hand their keys and values to the cache when they are finished, rotated and all.
    """

    def __init__(self, cache: Any, layer: PrefixAttention, start: torch.Tensor):
        self.cache, self.layer, self.start = cache, layer, start
        self.length: int | None = None
        """Number of tokens whose keys it was given."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the true cache returns for keys and values (B, heads, n + T, dim) that hold the prefix."""
        self.length = keys.shape[2]
        trained = self.layer.prefix.pair(self.layer.pair)
        keys, values = (self._put(mine, into) for mine, into in zip(trained.chunk(2, -1), (keys, values), strict=True))
        return (keys, values) if self.cache is None else self.cache.update(keys, values, *args, **kwargs)

    def get_seq_length(self, *args: Any) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def _put(self, trained: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        heads, length, width = into.shape[1:]
        trained = trained.to(into.device, into.dtype).view(len(trained), self.layer.heads, -1)
        if heads > trained.shape[1] or width > trained.shape[2]:
            raise AdapterError(
                f"this model's attention has {heads} heads of {width}, the prefix {trained.shape[1]} of "
                f"{trained.shape[2]}",
                key="token_dim",
            )
        trained = trained[:, :heads, :width].transpose(0, 1)  # (heads, n, dim)
        number = torch.arange(length, device=into.device) - self.start.to(into.device)  # (B, n + T)
        virtual = ((number >= 0) & (number < self.layer.count))[:, None, :, None]
        rows = trained[:, number.clamp(0, self.layer.count - 1)].transpose(0, 1)  # (B, heads, n + T, dim)
        return torch.where(virtual, rows, into)


@dataclass(frozen=True)
class Attention:
    """The self-attention layers that a prefix goes into."""

    names: list[str]
    """In the order of the layers."""
    heads: int
    """Heads that have keys and values of their own, in the layer with the largest heads."""
    width: int
    """Size of that layer's keys: heads * size of one. Others use the first numbers of each head."""


def find_attention(model: Any) -> Attention:
    """Return the self-attention layers of the model's decoder, or of its encoder if it has nothing else.

    Raises:
        AdapterError: not every layer has attention that keeps keys and values alone, or there are several stacks.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    below = f"{name_in(model, decoder)}.".lstrip(".")
    modules = base_modules(model)
    found: dict[int, str] = {}
    keeping = []
    for name, module in modules.items():
        index = vars(module).get("layer_idx")
        if not name.startswith(below) or not isinstance(index, int) or not keeps_keys(module):
            continue
        if not vars(module).get("is_cross_attention"):  # Idefics has it in a list of its own
            keeping.append(name)
        # of a layer's attentions the first counts, the second is to an encoder; a block may know its index too
        if index not in found or name.startswith(f"{found[index]}."):
            found[index] = name
    names = [found[index] for index in sorted(found)]
    parts = names[0].split(".") if names else []
    above = [".".join(parts[:count]) for count in range(1, len(parts))]
    stack = next((name for name in above if isinstance(modules[name], nn.ModuleList)), None)
    config: Any = getattr(decoder, "config", getattr(model, "config", None))  # FSMT's decoder has none
    others = {*(getattr(config, "layer_types", None) or ())} - _KEEPING
    whole = stack is not None and sorted(found) == list(range(len(modules[stack])))
    if others or not whole or not all(name.startswith(f"{stack}.") for name in keeping):
        other = "has it in some layers, or in several stacks" if found else "keeps something else"
        if others:
            other = f"has layers of {', '.join(sorted(others))}"
        raise AdapterError(
            "the method needs attention that keeps keys and values in every layer of a single stack; "
            f"{type(model).__name__} {other}",
            hint="choose another method, such as lora",
        )
    sizes = {name: _key_size(modules[name], config) for name in names}
    heads, width = max(sizes.values(), key=lambda size: size[1] / size[0])
    if crowded := [name for name in names if sizes[name][0] > heads]:
        raise AdapterError(
            f"{crowded[0]} has {sizes[crowded[0]][0]} heads, more than the {heads} of the layer with the largest ones"
        )
    return Attention(names, heads, width)


def targets(model: Any, config: PrefixConfig) -> list[str]:
    """Return the names of the attention layers that a prefix goes into, whose sizes the config then holds."""
    config.check_room(model)
    input_embedding_name(model)  # a model that hears or sees has none
    found = find_attention(model)
    submodules = 2 if getattr(model.config, "is_encoder_decoder", False) else 1
    for key, value in (
        ("num_layers", len(found.names)),
        ("num_attention_heads", found.heads),
        ("token_dim", found.width),
        ("num_transformer_submodules", submodules),
    ):
        if (given := vars(config)[key]) not in (None, value):
            raise AdapterError(f"the adapter's is {given}, the base model's {value}", key=key)
        setattr(config, key, value)
    return found.names


def wrap(module: nn.Module, name: str, config: PrefixConfig) -> PrefixAttention:
    """Return the layer over an attention layer."""
    assert config.num_layers is not None
    assert config.num_attention_heads is not None
    index: int = base_module(module).layer_idx
    pair = 2 * index % config.num_layers if config.num_transformer_submodules == 2 else index
    return PrefixAttention(module, pair, config.num_attention_heads)


def insert_prefix(model: Any, layers: Mapping[str, Any], prefix: Prefix) -> None:
    """Let all ``layers``, which are PrefixAttention, share ``prefix``, and start the decoder's sequences with it."""
    decoder, first = model.get_decoder(), base_module(next(iter(layers.values())))
    slides = "sliding_attention" in (getattr(decoder.config, "layer_types", None) or ())
    if slides and not model.config.is_encoder_decoder:
        decoder = model.base_model  # a model of several towers may give its decoder a mask of each kind of attention
    like = next(itertools.chain(first.parameters(), first.buffers()))
    prefix.to(like.device, adapter_dtype(like))
    # keys of a prefix are not rotated, so that its distance from the tokens counts, whatever the padding
    counts = generates(model) or getattr(first, "is_causal", False)
    for layer in layers.values():
        layer.prefix, layer.count = prefix.train(layer.training), prefix.count
        set_positions(layer, model, counts=counts)
    embedding = decoder.get_input_embeddings()
    names = {module: name for name, module in base_modules(decoder).items()}
    hook_once(decoder, _Insert(names[first], names.get(base_module(embedding))))
    hook_once(decoder, _Cut(names[first]), after=True)
    if isinstance(getattr(decoder, "pooler", None), nn.Module):
        hook_once(decoder.encoder, _CutForPooler(prefix), after=True)


@dataclass(frozen=True)
class _Insert:
    """The decoder's forward pre-hook: makes room for the prefix where a sequence starts."""

    attention: str
    """Path of the first layer, to whatever adapter layers stand there."""
    embedding: str | None
    """Path of the input embedding."""

    def __call__(self, decoder: Any, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]] | None:
        layer = active_at(decoder.get_submodule(self.attention), PrefixAttention)
        if layer is None:
            return None
        if self.embedding and active_at(decoder.get_submodule(self.embedding), VirtualTokens):
            raise AdapterError("two soft prompts are active; set one of them active")
        inputs = bound(decoder.forward, args, kwargs)
        layer.rows_of(inputs.pop("task_ids", None), 0)
        past, prefix, placed = cached_length(inputs), layer.prefix, layer.placeholders
        prefix.start, prefix.cuts = None, placed is None
        if placed is not None:  # generate has made the room
            prefix.start = placed.repeat_interleave(len(tokens_of(inputs)) // len(placed), dim=0)
            return None
        if past:
            return (), inputs | continued(decoder, inputs, past, layer.count)
        insertion = layer.begin(decoder, inputs)
        prefix.start = insertion.start
        return (), inputs | inserted(inputs, insertion)


@dataclass(frozen=True)
class _Cut:
    """The decoder's forward hook: takes out what came of the prefix's places."""

    attention: str

    def __call__(self, decoder: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        layer = active_at(decoder.get_submodule(self.attention), PrefixAttention)
        if layer is None:
            return output
        start, layer.prefix.start = layer.prefix.start, None
        if start is None or not layer.prefix.cuts:
            return output
        return _cut(output, start, tokens_of(kwargs).shape[1], layer.count)


@dataclass(frozen=True)
class _CutForPooler:
    """The same for a decoder with a pooler, which reads the first token: the hook of the layers below the pooler."""

    prefix: Prefix

    def __call__(self, encoder: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self.prefix.start is None or not self.prefix.cuts:
            return output
        length = (args[0] if args else kwargs["hidden_states"]).shape[1]
        return _cut(output, self.prefix.start, length, self.prefix.count)


def _cut(output: Any, start: torch.Tensor, length: int, count: int) -> Any:
    """Return ``output`` with every (B, n + T, D) in it cut to (B, T, D)."""
    if isinstance(output, torch.Tensor):
        return without(output, start, count) if output.ndim == 3 and output.shape[1] == length else output
    if isinstance(output, dict):
        for name, value in output.items():
            output[name] = _cut(value, start, length, count)
        return output
    return tuple(_cut(value, start, length, count) for value in output) if isinstance(output, tuple) else output


def keeps_keys(module: nn.Module) -> bool:
    """Return whether the module is attention that gives its keys and values to a cache."""
    arguments = inspect.signature(module.forward).parameters
    reads = all(any(name in arguments for name in names) for names in (CACHE, MASK))
    return reads and any(name in vars(module) for name in _SIZE)


def _key_size(attention: Any, config: Any) -> tuple[int, int]:
    """Return the number of heads that have keys of their own, and the size of all their keys together."""
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = next(vars(attention)[name] for name in _SIZE if name in vars(attention))
    for name in ("k_proj", "key", "k"):
        projection = attention._modules.get(name)
        if projection is not None and (view := linear_view(projection)) is not None:
            heads = view.out_features // size
    return heads, heads * size


def _start_in(mask: Any, length: int, true_hides: bool) -> torch.Tensor:
    """Return where each row's left padding ends (B, 1), by a layer's mask: a token sees itself, padding does not."""
    if not isinstance(mask, torch.Tensor):
        raise AdapterError(
            f"a prefix cannot train with checkpointed activations and a {type(mask).__name__}; set attn_implementation "
            "to sdpa or eager"
        )
    if mask.ndim == 4:
        mask = mask[:, 0]  # (B, 1 or n + T, keys)
        mask = mask[:, 0] if mask.shape[1] == 1 else mask.diagonal(dim1=1, dim2=2)
    if mask.is_floating_point():
        mask = mask > torch.finfo(mask.dtype).min / 2
    return starts(~mask[:, :length] if true_hides else mask[:, :length])
