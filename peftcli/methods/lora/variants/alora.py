"""aLoRA: Activated LoRA (https://arxiv.org/abs/2504.12397).

The adapter is off until the last place where ``alora_invocation_tokens`` stand in a row of ``input_ids``, so keys and
values of what comes before are those of the base model, and a cache of the base model can be used. A row without them
is the base model's.

While tokens are generated, each pass sees the new tokens only. Which rows are active is kept on the cache object, which
is what a sequence is continued with, whoever calls the model.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peftcli.errors import AdapterError
from peftcli.methods._delta import layers_of_kind
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.lora import LoraLinear

_CACHE = ("cache", "past_key_values")
"""transformers' names of the cache, the newest first."""
_ACTIVE = "_active_loras"
"""Attribute of a cache: invocation tokens -> rows (B,) that were active at its last token."""
_KEY = "alora_invocation_tokens"


class ALoraLinear(LoraLinear):
    """A linear layer with a LoRA that is on from the invocation tokens of each row."""

    def __init__(self, base_layer: nn.Module, name: str, config: LoraConfig):
        super().__init__(base_layer, name, config)
        if isinstance(config.alora_invocation_tokens, str):
            raise AdapterError("must be token ids here; a recipe and get_peft_model take a text too", key=_KEY)
        self.name, self.tokens = name, tuple(config.alora_invocation_tokens or ())
        self.active: torch.Tensor | None = None
        """Where the adapter is on in the batch on its way through the model: (B, T)."""
        self.recomputes = False
        """Whether the backward pass calls the layer again."""

    def update(self, x: torch.Tensor) -> torch.Tensor:
        active = self.active
        if active is None:
            raise AdapterError("aLoRA finds its place in the input_ids of the whole model; call that", key=_KEY)
        z = super().update(x)
        if self.recomputes and z.requires_grad:
            z.register_hook(functools.partial(self._check_batch, active))
        return z.masked_fill(~self._places(active, x), 0.0)

    def _places(self, active: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return ``active`` for the positions of ``x``: (B, T, D), its last ones (B, t, D), or all as (B * T, D)."""
        if self.serves and self.serves.numbers is not None:
            active = active[self.serves.numbers]
        rows, tokens = active.shape
        if x.ndim == 3 and len(x) == rows and x.shape[1] <= tokens:
            return active[:, tokens - x.shape[1] :].unsqueeze(-1)
        if x.ndim == 2 and len(x) == rows * tokens:
            return active.reshape(-1, 1)
        raise AdapterError(
            f"{self.name} gets an input of the shape {tuple(x.shape)}, which does not show the tokens of a batch of "
            f"{rows} x {tokens}; aLoRA cannot adapt it",
            key="target_modules",
        )

    def _check_batch(self, active: torch.Tensor, gradient: torch.Tensor) -> None:
        if self.active is not active:
            raise AdapterError(
                "with gradient checkpointing, aLoRA needs backward() after each forward pass, before the next one",
                key=_KEY,
            )

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        raise AdapterError("aLoRA cannot be merged: the tokens before the invocation need the base weights", key=_KEY)


def find_invocations(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tell the layers, before a call of the model, where they are on.

    ``alora_offsets``, PEFT's, counts from the end of each row; None: nowhere.
    """
    offsets = kwargs.pop("alora_offsets", None)
    ids = kwargs["input_ids"] if "input_ids" in kwargs else next(iter(args), None)
    cache = _cache_in(kwargs)
    places: dict[tuple[int, ...], torch.Tensor] = {}
    for layer in _layers(model):
        if layer.tokens not in places:
            found = _places(ids, layer.tokens, offsets)
            places[layer.tokens] = found | _continued(cache, layer.tokens, found)
            if model.training and not places[layer.tokens].any():
                warnings.warn(
                    f"no row of the batch holds the alora_invocation_tokens {list(layer.tokens)}; it trains nothing",
                    stacklevel=2,
                )
        layer.active = places[layer.tokens]
        layer.recomputes = model.training and _is_checkpointing(model)
    return args, kwargs


def keep_active(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Note on the cache which rows are active, and forget the batch, unless a backward pass may compute it again."""
    cache = _cache_in(output) if isinstance(output, dict) else None
    if isinstance(output, tuple):  # of return_dict=False
        cache = next((value for value in output if hasattr(value, "get_seq_length")), None)
    cache = _cache_in(kwargs) if cache is None else cache
    layers = [layer for layer in _layers(model) if layer.active is not None]
    if cache is not None:
        setattr(cache, _ACTIVE, {layer.tokens: layer.active[:, -1] for layer in layers if layer.active is not None})
    for layer in layers:
        if not (model.training and torch.is_grad_enabled()):
            layer.active = None


def _is_checkpointing(model: nn.Module) -> bool:
    found = getattr(model, "is_activation_checkpointing", None)  # before transformers 5.24, it has the other name
    return bool(getattr(model, "is_gradient_checkpointing", False) if found is None else found)


def _cache_in(values: dict[str, Any]) -> Any:
    found = (dict.get(values, name) for name in _CACHE)  # an output's own get warns of the old name
    return next((cache for cache in found if cache is not None), None)


def _layers(model: nn.Module) -> list[ALoraLinear]:
    return [layer for layer in layers_of_kind(model, ALoraLinear).values() if layer.enabled]


def _places(ids: Any, tokens: tuple[int, ...], offsets: Sequence[int | None] | None) -> torch.Tensor:
    """Return where the adapter is on: (B, T), from the last place of ``tokens`` in each row of ``ids``."""
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.ndim != 2:
        raise AdapterError("needs input_ids (batch, tokens); the place is not seen in embeddings", key=_KEY)
    length = ids.shape[1]
    positions = torch.arange(length, device=ids.device)
    if offsets is not None:
        counts = torch.tensor([offset or 0 for offset in offsets], device=ids.device)
        return positions >= length - counts.unsqueeze(1)
    if length < len(tokens):
        return torch.zeros_like(ids, dtype=torch.bool)
    wanted = torch.tensor(tokens, device=ids.device)
    starts = (ids.unfold(1, len(tokens), 1) == wanted).all(-1)
    last = torch.where(starts, positions[: starts.shape[1]], -1).amax(1, keepdim=True)
    return (last >= 0) & (positions >= last)


def _continued(cache: Any, tokens: tuple[int, ...], found: torch.Tensor) -> torch.Tensor:
    """Return which rows of the batch were active at the last token of the cache: (B, 1)."""
    rows = getattr(cache, _ACTIVE, {}).get(tokens) if cache is not None and cache.get_seq_length() else None
    if rows is None:
        return torch.zeros_like(found[:, :1])
    if len(found) % len(rows):
        raise AdapterError(f"the cache is of {len(rows)} rows, the batch of {len(found)}", key=_KEY)
    return rows.repeat_interleave(len(found) // len(rows)).unsqueeze(1).to(found.device)
