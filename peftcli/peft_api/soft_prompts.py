"""The virtual tokens of soft prompts under PEFT's names."""

from __future__ import annotations

import torch
from torch import nn

from peftcli.core.layer import adapter_layers
from peftcli.core.prompts.inputs import SoftPrompt
from peftcli.core.prompts.virtual_tokens import VirtualTokens
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


def prompts(model: nn.Module, adapter: str, rows: int, task_ids: torch.Tensor | None = None) -> torch.Tensor:
    """Return the vectors of an adapter's virtual tokens, once for each of the rows: (B, n, D).

    Raises:
        AdapterError: the adapter has no such vectors, or the tasks do not fit.
    """
    for layer in adapter_layers(model, adapter).values():
        if isinstance(layer, VirtualTokens):
            tasks = layer.rows_of(task_ids, rows)
            numbers = torch.arange(layer.count).expand(rows, -1)
            return layer.table()[numbers if tasks is None else numbers + layer.count * tasks.cpu()]
    raise AdapterError(
        f"{adapter!r} has no virtual tokens that stand for embeddings",
        key="adapter_name",
        hint="get_prompt_embedding_to_save gives the keys and values of a prefix",
    )


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
