"""PEFT's names of soft prompts: their vectors, and how cartridges and prefixes start and are composed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftcli.adapters.load import find_adapter
from peftcli.core.files import read_tensors, write_adapter
from peftcli.core.layer import adapter_layers
from peftcli.core.prompts.config import PrefixConfig
from peftcli.core.prompts.inputs import SoftPrompt
from peftcli.core.prompts.virtual_tokens import VirtualTokens
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
from peftcli.methods.cartridge.layers import compose, prefix_from_cache, start_from_tokens, start_prefix
from peftcli.peft_api.state_dicts import refuse_pickle

_NAMES = {"prompt_embeddings": "embedding.weight", "delta": "delta_embedding.weight"}
"""Name of a weight in its layer -> name in PEFT's prompt encoder."""


def prompt_encoder(model: Any) -> nn.ModuleDict:
    """Return PEFT's prompt encoder of each soft prompt of a PeftModel, by adapter: ``["default"].embedding.weight``.

    They hold the weights that train, under PEFT's names, and cannot be called.

    Raises:
        AttributeError: the model has no soft prompt.
    """
    found: dict[str, nn.Module] = {}
    for layer in adapter_layers(model).values():
        if not isinstance(layer, SoftPrompt) or layer.adapter in found:  # the layers of a prefix share it
            continue
        found[layer.adapter] = encoder = nn.Module()
        for name, value in {**layer.own_tensors(), **layer.fixed_tensors()}.items():
            own = name.removeprefix("prefix.").removeprefix("prompt_encoder.")
            path, _, leaf = _NAMES.get(own, own).rpartition(".")
            module = encoder
            for part in path.split(".") if path else ():
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, value)  # type: ignore[arg-type]
    if not found:
        raise AttributeError("prompt_encoder: the model has no soft prompt")
    return nn.ModuleDict(found)


def get_prompt_embedding_to_save(model: Any, adapter_name: str) -> torch.Tensor:
    """Return the vectors of an adapter's virtual tokens as its file holds them: (n, D), on the CPU.

    Raises:
        AdapterError: the adapter has no virtual tokens.
    """
    model.check_known([adapter_name])
    state = adapter_state(model.get_base_model(), adapter_name)
    if "prompt_embeddings" not in state:
        raise AdapterError(f"{adapter_name!r} has no virtual tokens", key="adapter_name")
    return state["prompt_embeddings"].detach().cpu()


def get_prompt(
    model: Any, batch_size: int, task_ids: torch.Tensor | None = None, max_cache_len: int | None = None
) -> torch.Tensor:
    """Return the vectors of the active adapter's virtual tokens for each row of a batch: (B, n, D).

    ``max_cache_len`` is for prefixes in PEFT; here only ``get_prompt_embedding_to_save`` gives those.

    Raises:
        AdapterError: the adapter has no such vectors, or the tasks do not fit.
    """
    adapter = model.active_adapters[0]
    for layer in adapter_layers(model, adapter).values():
        if isinstance(layer, VirtualTokens):
            tasks = layer.rows_of(task_ids, batch_size)
            numbers = torch.arange(layer.count).expand(batch_size, -1)
            return layer.table()[numbers if tasks is None else numbers + layer.count * tasks.cpu()]
    raise AdapterError(
        f"{adapter!r} has no virtual tokens that stand for embeddings",
        key="adapter_name",
        hint="get_prompt_embedding_to_save gives the keys and values of a prefix",
    )


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> torch.Tensor:
    """Return the first tokens' keys and values of a cache as an adapter file holds them: (n, layers * 2 * width).

    Raises:
        AdapterError: the cache is of several sequences, or shorter than the prefix.
    """
    return prefix_from_cache(past_key_values, num_virtual_tokens)


def initialize_kv_prefix_from_past_key_values(
    model: Any,
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
    model: Any,
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
    refuse_pickle(safe_serialization)
    sources = [find_adapter(str(path)) for path in adapter_paths]
    config, tensors = compose([source.config for source in sources], [read_tensors(one.folder) for one in sources])
    write_adapter(tensors, config, Path(output_path))


def _prefix_of(model: Any, name: str | None, count: int | None) -> tuple[str, int]:
    """Return the adapter's name and the number of its virtual tokens."""
    config = model.active_peft_config if name is None else model.peft_config.get(name)
    if not isinstance(config, PrefixConfig):
        raise AdapterError("names no cartridge and no prefix of this model", key="adapter_name")
    own = model.active_adapters[0] if name is None else name
    return own, config.num_virtual_tokens if count is None else count
