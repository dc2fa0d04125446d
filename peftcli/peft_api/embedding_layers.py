"""The base model's embedding and head in an adapter file: ``save_embedding_layers`` of PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch.distributed.tensor import DTensor

from peftcli.adapters.load import is_hub_id
from peftcli.core.config import AdapterConfig
from peftcli.core.layer import TrainedCopy, adapter_layers, base_module
from peftcli.core.weights import base_weights
from peftcli.errors import AdapterError

_TARGETS = ("embed_tokens.base_layer", "lm_head.base_layer")
"""What PEFT writes where an adapter targets it. Other names of embeddings and heads it does not look for."""


def embedding_layers(model: Any, config: AdapterConfig, adapter: str, save: bool | str) -> dict[str, torch.Tensor]:
    """Return the weights to write beside an adapter's own, by their names in the file.

    With ``save`` they are embedding and head. ``auto``: the same where the model has another number of tokens than the
    checkpoint that the config names, else those that are targets.

    Raises:
        AdapterError: ``save`` is something else, or this process does not hold a whole weight: offloaded, or divided.
    """
    if save not in (True, False, "auto"):
        raise AdapterError(f'is {save!r}; known: "auto", True, False', key="save_embedding_layers")
    if save is False:
        return {}
    found = {parameter: name for name, parameter in reversed(base_weights(model, adapter, config.file_prefix).items())}
    copied = [base_module(each) for each in adapter_layers(model, adapter).values() if isinstance(each, TrainedCopy)]
    for value in (value for each in copied for value in each.parameters()):
        found.pop(value, None)  # the file holds the copy
    if save == "auto" and not _is_resized(model, config):
        rows = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None)
        found = {value: name for value, name in found.items() if not rows and any(part in name for part in _TARGETS)}
    if missing := [name for value, name in found.items() if value.is_meta or isinstance(value, DTensor)]:
        hint = "give a state that holds it, or pass save_embedding_layers=False"
        raise AdapterError(f"lacks {missing[0]}, which is not whole in this process", key="state_dict", hint=hint)
    return {name: value.detach() for value, name in found.items()}


def _is_resized(model: Any, config: AdapterConfig) -> bool:
    """Return whether the model has another number of tokens than its checkpoint, as far as this machine has that."""
    name = config.base_model_name_or_path
    if not name or not hasattr(getattr(model, "config", None), "get_text_config"):
        return False
    path = Path(name, "config.json")
    if not path.is_file() and is_hub_id(name):
        path = Path(try_to_load_from_cache(name, "config.json", revision=config.revision) or path)
    if not path.is_file():
        return False
    before = type(model.config).from_pretrained(path.parent)
    sizes = [getattr(each.get_text_config(), "vocab_size", None) for each in (before, model.config)]
    return sizes[0] != sizes[1]
