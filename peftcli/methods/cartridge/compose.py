"""Several cartridges as one: their tokens one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from peftcli.core.config import AdapterConfig
from peftcli.errors import AdapterError
from peftcli.methods.cartridge import CartridgeConfig

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
