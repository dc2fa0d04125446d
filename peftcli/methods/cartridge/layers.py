"""A cartridge: a trained prefix that starts as what the model remembers of a document (https://arxiv.org/abs/2506.06266)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.inject import disabled, evaluating
from peftcli.core.layer import AdapterLayer
from peftcli.core.prompts.prefix import Prefix, PrefixAttention, insert_prefix
from peftcli.core.prompts.prefix import targets as targets
from peftcli.core.prompts.prefix import wrap as wrap
from peftcli.errors import AdapterError
from peftcli.methods._delta import layers_of_kind
from peftcli.methods.cartridge import CartridgeConfig

_FROZEN = "prefix.frozen_embedding"


class Cartridge(Prefix):
    """Keys and values of which the first tokens' stay as they are: (k, pairs * 2 * width), and the others' train."""

    def __init__(self, count: int, pairs: int, width: int, frozen: int):
        super().__init__(count, pairs, width)
        size = pairs * 2 * width
        self.frozen_embedding = nn.Parameter(torch.randn(frozen, size), requires_grad=False)
        self.trainable_embedding = nn.Parameter(torch.randn(count - frozen, size))

    def pair(self, index: int) -> torch.Tensor:
        columns = slice(index * 2 * self.width, (index + 1) * 2 * self.width)
        return torch.cat([self.frozen_embedding[:, columns], self.trainable_embedding[:, columns]])

    def whole(self) -> torch.Tensor:
        return torch.cat([self.frozen_embedding, self.trainable_embedding])

    def parts(self) -> list[torch.Tensor]:
        return [self.frozen_embedding, self.trainable_embedding]


def attach(model: nn.Module, config: CartridgeConfig, layers: Mapping[str, AdapterLayer]) -> None:
    """Let the new layers share a cartridge, and the model's inputs make room for it."""
    assert config.num_layers is not None
    assert config.token_dim is not None
    count, frozen = config.num_virtual_tokens, config.num_frozen_tokens
    insert_prefix(model, layers, Cartridge(count, config.num_layers, config.token_dim, frozen))
    for layer in layers.values():
        layer.fixed = (_FROZEN,)


def needs_batches(config: CartridgeConfig) -> bool:
    """Return whether the cartridge starts from a document."""
    return config.document_ids is not None


@torch.no_grad()
def calibrate(model: Any, config: CartridgeConfig, batches: Iterable[Any]) -> None:
    """Start from the keys and values of the document."""
    ids = torch.tensor([config.document_ids], device=next(model.parameters()).device)
    start_from_tokens(model, ids, config.num_virtual_tokens)


@torch.no_grad()
def start_from_tokens(model: Any, ids: torch.Tensor, count: int, adapter: str | None = None) -> torch.Tensor:
    """Start an adapter's prefix from what the base model remembers of ``ids`` (1, T): see ``start_prefix``."""
    with evaluating(model), disabled(model):
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    cache = output.get("cache")  # transformers 5.24's name; it warns of the other one
    values = prefix_from_cache(output["past_key_values"] if cache is None else cache, count)
    start_prefix(model, values, adapter)
    return values


@torch.no_grad()
def start_prefix(model: nn.Module, values: torch.Tensor, adapter: str | None = None) -> None:
    """Copy the keys and values (n, pairs * 2 * width) into the prefix of the model's adapter.

    Raises:
        AdapterError: it has no prefix, or one that a network makes, or of another size.
    """
    layers = list(layers_of_kind(model, PrefixAttention, adapter).values())
    if not layers:
        raise AdapterError("the adapter has no prefix; use CARTRIDGE or PREFIX_TUNING", key="adapter_name")
    prefix = layers[0].prefix
    if prefix.whole().shape != values.shape:
        raise AdapterError(f"the prefix is {tuple(prefix.whole().shape)}, the values are {tuple(values.shape)}")
    prefix.fill(values)


def prefix_from_cache(cache: Any, count: int) -> torch.Tensor:
    """Return the keys and values of a sequence's first tokens, as a prefix has them: (n, pairs * 2 * width).

    Args:
        cache: what a model returned for one sequence: a cache of transformers, or its pairs (1, heads, T, dim).
        count: number n of tokens.

    Raises:
        AdapterError: it does not hold them.
    """
    pairs = [(each.keys, each.values) for each in cache.layers] if hasattr(cache, "layers") else [*cache]
    tensors = [tensor for keys, values, *_ in pairs for tensor in (keys, values)]
    if not tensors or any(tensor is None or tensor.ndim != 4 for tensor in tensors):
        raise AdapterError("holds no keys and values of every layer", key="past_key_values")
    if len({tensor.shape for tensor in tensors}) > 1:
        raise AdapterError("holds keys and values of different sizes", key="past_key_values")
    rows, heads, length, width = tensors[0].shape
    if rows != 1:
        raise AdapterError(f"holds {rows} sequences; read one", key="past_key_values")
    seen = [each.get_seq_length() for each in getattr(cache, "layers", ())]
    if min([length, *seen]) < count or max([length, *seen]) > length:  # a window forgets the first tokens
        raise AdapterError(f"does not hold the first {count} tokens", key="past_key_values")
    first = [tensor[0, :, :count].transpose(0, 1).reshape(count, heads * width) for tensor in tensors]
    return torch.cat(first, dim=1)


_EQUAL = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


def compose(
    configs: Sequence[AdapterConfig], tensors: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[CartridgeConfig, dict[str, torch.Tensor]]:
    """Return the cartridge that holds the tokens of all; those that the first one freezes stay frozen.

    Raises:
        AdapterError: there are fewer than two, or one is of another method or fits another base model.
    """
    own = [config for config in configs if isinstance(config, CartridgeConfig)]
    if len(own) < 2 or len(own) < len(configs):
        found = ", ".join(config.peft_type for config in configs) or "nothing"
        raise AdapterError(f"composing takes two cartridges or more, not {found}")
    for config in own[1:]:
        for key in _EQUAL:
            if (value := getattr(config, key)) != (first := getattr(own[0], key)):
                raise AdapterError(f"one cartridge has {first}, another {value}", key=key)
    whole = torch.cat([each["prompt_embeddings"] for each in tensors])
    return replace(own[0], num_virtual_tokens=len(whole)), {"prompt_embeddings": whole}
