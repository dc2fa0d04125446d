"""The virtual tokens of soft prompts under PEFT's names."""

from __future__ import annotations

import torch
from torch import nn

from peftcli.core.layer import adapter_layers
from peftcli.core.prompts.inputs import SoftPrompt
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError

_NAMES = {"prompt_embeddings": "embedding.weight", "delta": "delta_embedding.weight"}
"""Name of a weight in its layer -> name in PEFT's prompt encoder."""


def prompt_encoders(model: nn.Module) -> nn.ModuleDict:
    """Return PEFT's prompt encoder of each soft prompt in the model, by adapter: ``["default"].embedding.weight``.

    They hold the weights that train, under PEFT's names, and cannot be called.

    Raises:
        AttributeError: the model has no soft prompt.
    """
    found: dict[str, nn.Module] = {}
    for layer in adapter_layers(model).values():
        if isinstance(layer, SoftPrompt) and layer.adapter not in found:  # the layers of a prefix share it
            found[layer.adapter] = _prompt_encoder(layer)
    if not found:
        raise AttributeError("prompt_encoder: the model has no soft prompt")
    return nn.ModuleDict(found)


def prompt_embedding(model: nn.Module, adapter: str) -> torch.Tensor:
    """Return the vectors of an adapter's virtual tokens as its file holds them: (n, D), on the CPU.

    Raises:
        AdapterError: the adapter has no virtual tokens.
    """
    state = adapter_state(model, adapter)
    if "prompt_embeddings" not in state:
        raise AdapterError(f"{adapter!r} has no virtual tokens", key="adapter_name")
    return state["prompt_embeddings"].detach().cpu()


def _prompt_encoder(layer: SoftPrompt) -> nn.Module:
    encoder = nn.Module()
    for name, value in {**layer.own_tensors(), **layer.fixed_tensors()}.items():
        own = name.removeprefix("prefix.").removeprefix("prompt_encoder.")
        path, _, leaf = _NAMES.get(own, own).rpartition(".")
        module = encoder
        for part in path.split(".") if path else ():
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, value)  # type: ignore[arg-type]
    return encoder
