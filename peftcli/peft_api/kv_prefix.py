"""PEFT's functions for cartridges and prefixes: start one from a text or a cache, and compose several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peftcli.adapters.load import find_adapter
from peftcli.core.files import read_tensors, write_adapter
from peftcli.core.prompts.config import PrefixConfig
from peftcli.errors import AdapterError
from peftcli.methods.cartridge.compose import compose
from peftcli.methods.cartridge.layers import prefix_from_cache, start_from_tokens, start_prefix
from peftcli.peft_api.model import PeftModel


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> torch.Tensor:
    """Return the first tokens' keys and values of a cache as an adapter file holds them: (n, layers * 2 * width).

    Raises:
        AdapterError: the cache is of several sequences, or shorter than the prefix.
    """
    return prefix_from_cache(past_key_values, num_virtual_tokens)


def initialize_kv_prefix_from_past_key_values(
    model: PeftModel,
    *,
    adapter_name: str | None = None,
    past_key_values: Any,
    num_virtual_tokens: int | None = None,
) -> torch.Tensor:
    """Start a cartridge or a prefix from the first tokens of a cache, and return its new keys and values.

    Raises:
        AdapterError: the adapter has no prefix or one that a network makes, or the cache does not fit it.
    """
    name, count = _prefix_of(model, adapter_name, num_virtual_tokens)
    values = prefix_from_cache(past_key_values, count)
    start_prefix(model.get_base_model(), values, name)
    return values


def initialize_kv_prefix_from_text(
    model: PeftModel,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> torch.Tensor:
    """Start a cartridge or a prefix from what the base model remembers of a text, and return its new keys and values.

    With ``use_chat_template`` the model reads the text as a system message, if the tokenizer has a chat template. It
    reads no more than ``max_length`` tokens.

    Raises:
        AdapterError: the adapter has no prefix or one that a network makes, or the text is too short for it.
    """
    name, count = _prefix_of(model, adapter_name, num_virtual_tokens)
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template([{"role": "system", "content": text}], tokenize=True, return_dict=False)
    else:
        ids = tokenizer(text)["input_ids"]
    base = model.get_base_model()
    tokens = torch.tensor([ids[:max_length]], device=next(base.parameters()).device)
    return start_from_tokens(base, tokens, count, name)


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path], *, output_path: str | Path, safe_serialization: bool = True
) -> None:
    """Write a cartridge that holds the tokens of several, one after the other.

    Raises:
        AdapterError: one is not a cartridge, or they are of different base models.
        StorageError: the folder cannot be written.
    """
    if not safe_serialization:
        raise AdapterError("False would write a pickle, which can run code when it is read", key="safe_serialization")
    sources = [find_adapter(str(path)) for path in adapter_paths]
    config, tensors = compose([source.config for source in sources], [read_tensors(one.folder) for one in sources])
    write_adapter(tensors, config, Path(output_path))


def _prefix_of(model: PeftModel, name: str | None, count: int | None) -> tuple[str, int]:
    """Return the adapter's name and the number of its virtual tokens."""
    config = model.active_peft_config if name is None else model.peft_config.get(name)
    if not isinstance(config, PrefixConfig):
        raise AdapterError("names no cartridge and no prefix of this model", key="adapter_name")
    own = model.active_adapters[0] if name is None else name
    return own, config.num_virtual_tokens if count is None else count
