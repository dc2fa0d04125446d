"""Virtual tokens: trained vectors that stand before the input.

A virtual token is a token id past the base model's vocabulary. ``insert_virtual_tokens`` puts those ids into the
input once, where the sequence starts, and the layer over the input embedding gives them their trained vectors. To
the model they are ordinary tokens, so positions, attention masks, every kind of cache and beam search need no care.
They stand after a row's left padding, so each row of a padded batch computes what it computes alone.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import AdapterLayer, adapter_dtype
from peftcli.errors import AdapterError

IGNORED = -100
"""The label of a position that does not count."""


class VirtualTokens(AdapterLayer):
    """An input embedding that knows ``n`` more ids than the vocabulary has: (B, T) -> (B, T, D)."""

    def __init__(self, base_layer: nn.Module, vectors: torch.Tensor):
        super().__init__(base_layer)
        self.prompt_embeddings = nn.Parameter(vectors.to(adapter_dtype(self.base_layer.weight)))
        self.placeholders: torch.Tensor | None = None  # while ``generate`` runs: where they start in each row (B, 1)

    @property
    def count(self) -> int:
        """Number of virtual tokens."""
        return self.prompt_embeddings.shape[0]

    @property
    def first_id(self) -> int:
        """Id of the first virtual token: the size of the base vocabulary."""
        return int(self.base_layer.weight.shape[0])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return self.base_layer(ids)
        tokens = self.base_layer(ids.clamp(max=self.first_id - 1))
        virtual = F.embedding((ids - self.first_id).clamp(min=0), self.prompt_embeddings).to(tokens.dtype)
        return torch.where((ids >= self.first_id).unsqueeze(-1), virtual, tokens)

    def file_name(self, path: str, tensor: str) -> str:
        return tensor

    def accepts(self, tensor: str, value: torch.Tensor) -> torch.Tensor:
        # PEFT allocates the rows twice for encoder-decoder models and trains the first half
        return value[: self.count] if value.shape == (2 * self.count, self.prompt_embeddings.shape[1]) else value


def input_embedding_name(model: Any) -> str:
    """Path of the module that embeds the ids of the input: an encoder-decoder's encoder reads it."""
    embedding = _reader(model).get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embedding)


def virtual_tokens(model: nn.Module) -> VirtualTokens | None:
    """The model's virtual tokens, unless it has none or they are disabled."""
    found = (module for module in model.modules() if isinstance(module, VirtualTokens) and module.enabled)
    return next(found, None)


def insert_virtual_tokens(model: nn.Module) -> None:
    """Let every forward call of ``model`` that starts a sequence start it with the virtual tokens."""
    reader = _reader(model)
    _hook(reader, _Insert(_path(reader), encodes=reader is not model))
    if reader is not model:
        _hook(model, _Extend(_path(model)))


def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """``model.generate``, with the virtual tokens if there are any; they are not in the answer.

    Takes and returns what ``transformers.GenerationMixin.generate`` does. While it runs, the ids hold a placeholder
    of the vocabulary for each virtual token, so that lengths, positions and logits processors stay right.
    """
    layer = virtual_tokens(model)
    if layer is None or model.config.is_encoder_decoder:  # the ids that grow there are the decoder's
        return model.generate(*args, **kwargs)
    inputs = _bound(model.generate, args, kwargs)
    if inputs.get("inputs") is not None:
        inputs["input_ids"] = inputs.pop("inputs")
    ids = inputs.get("input_ids")
    if ids is None:
        raise AdapterError("generation with virtual tokens needs input_ids")
    settings = inputs.get("generation_config") or model.generation_config
    if inputs.get("attention_mask") is None:
        inputs["attention_mask"] = _mask_of(ids, settings.pad_token_id, settings.eos_token_id)
    starts = _starts(inputs["attention_mask"])
    inputs |= _inserted({key: inputs.get(key) for key in ("input_ids", "attention_mask", "token_type_ids")}, layer)
    first = ids.gather(1, starts.clamp(max=ids.shape[1] - 1))  # a token that the row holds anyway
    inputs["input_ids"] = torch.where(inputs["input_ids"] < layer.first_id, inputs["input_ids"], first)
    inputs = {key: value for key, value in inputs.items() if value is not None}
    for length in ("max_length", "min_length"):  # both count the prompt
        if value := inputs.get(length) or getattr(settings, length):
            inputs[length] = value + layer.count
    layer.placeholders = starts
    try:
        output = model.generate(**inputs)
    finally:
        layer.placeholders = None
    if isinstance(output, torch.Tensor):
        return _without(output, starts, layer.count)
    output.sequences = _without(output.sequences, starts, layer.count)
    return output


@dataclass(frozen=True)
class _Insert:
    """The forward pre-hook of the model or encoder that reads the input.

    Holds a path, not the layer, so that a copied model's hook finds the copy's layer.
    """

    path: str
    encodes: bool
    """Whether it is an encoder inside an encoder-decoder."""

    def __call__(self, model: Any, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]] | None:
        layer = model.get_submodule(self.path)
        if not isinstance(layer, VirtualTokens) or not layer.enabled:
            return None
        inputs = _bound(model.forward, args, kwargs)
        past = _cached_length(inputs)
        if layer.placeholders is not None:
            return (), inputs if past else inputs | _restored(inputs, layer.placeholders, layer)
        if past:
            return (), inputs | _continued(model, inputs, past, layer)
        if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
            return None
        mask = inputs.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            raise AdapterError("virtual tokens need a two-dimensional attention_mask; generate through peftcli's model")
        if self.encodes and mask is not None and mask.shape[1] == _length(inputs) + layer.count:
            inputs["attention_mask"] = _without(mask, _starts(mask), layer.count)  # _Extend was here first
        generates = hasattr(model, "prepare_inputs_for_generation")
        if generates and mask is not None and inputs.get("position_ids") is None and _takes(model, "position_ids"):
            inputs["position_ids"] = _positions(mask)
        inputs.pop("cache_position", None)  # counted without them; models find it by themselves
        return (), inputs | _inserted(inputs, layer)


@dataclass(frozen=True)
class _Extend:
    """The forward pre-hook of an encoder-decoder, whose decoder attends to what the encoder read."""

    path: str

    def __call__(self, model: Any, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]] | None:
        layer = model.get_submodule(self.path)
        if not isinstance(layer, VirtualTokens) or not layer.enabled:
            return None
        inputs = _bound(model.forward, args, kwargs)
        mask, encoded = inputs.get("attention_mask"), inputs.get("encoder_outputs")
        if mask is None or (encoded is not None and mask.shape[1] == encoded[0].shape[1]):
            return None
        return (), inputs | {"attention_mask": _extended(mask, layer)}


def _hook(module: nn.Module, hook: _Insert | _Extend) -> None:
    """Register the hook, unless an adapter that was unloaded left the same one."""
    if hook not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook, with_kwargs=True)


def _reader(model: Any) -> Any:
    """The module that takes the input ids."""
    return model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model


def _path(model: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if isinstance(module, VirtualTokens))


def _inserted(inputs: dict[str, Any], layer: VirtualTokens) -> dict[str, Any]:
    """The inputs (B, T, ...) with the virtual tokens after each row's left padding: (B, n + T, ...)."""
    ids, embeds, mask = inputs.get("input_ids"), inputs.get("inputs_embeds"), inputs.get("attention_mask")
    given = ids if ids is not None else embeds
    assert given is not None
    (batch, length), n = given.shape[:2], layer.count
    start = torch.zeros(batch, 1, dtype=torch.long, device=given.device) if mask is None else _starts(mask)
    slot = torch.arange(n + length, device=given.device).expand(batch, -1)
    after = slot >= start + n
    virtual = (slot >= start) & ~after
    source = torch.where(after, slot - n, slot).clamp(max=length - 1)
    number = (slot - start).clamp(0, n - 1)  # which virtual token

    def spread(value: torch.Tensor, filler: torch.Tensor | int) -> torch.Tensor:
        return torch.where(virtual, filler, value.expand(batch, -1).gather(1, source))

    out: dict[str, Any] = {}
    if ids is not None:
        out["input_ids"] = spread(ids, layer.first_id + number)
    elif embeds is not None:
        rows = embeds.gather(1, source.unsqueeze(-1).expand(-1, -1, embeds.shape[-1]))
        vectors = F.embedding(number, layer.prompt_embeddings).to(embeds.dtype)
        out["inputs_embeds"] = torch.where(virtual.unsqueeze(-1), vectors, rows)
    if mask is not None:
        out["attention_mask"] = spread(mask, 1)
    if (position := inputs.get("position_ids")) is not None:
        position = position.expand(batch, -1)
        first = position.gather(1, start.clamp(max=length - 1))
        out["position_ids"] = spread(position, first + number) + n * after
    if (types := inputs.get("token_type_ids")) is not None:
        out["token_type_ids"] = spread(types, 0)
    target = inputs.get("labels")
    if target is not None and target.shape == (batch, length):
        out["labels"] = spread(target, IGNORED)
    return out


def _continued(model: Any, inputs: dict[str, Any], past: int, layer: VirtualTokens) -> dict[str, Any]:
    """The inputs of a later step, whose mask and positions may not count the virtual tokens that the cache holds."""
    mask, n, new = inputs.get("attention_mask"), layer.count, _length(inputs)
    if mask is None or mask.ndim != 2 or mask.shape[1] != past + new - n:
        return {}
    mask = _extended(mask, layer)
    out: dict[str, Any] = {"attention_mask": mask}
    for name in ("position_ids", "cache_position"):
        if (value := inputs.get(name)) is not None:
            out[name] = value + n
    if "position_ids" not in out and _takes(model, "position_ids"):
        out["position_ids"] = _positions(mask)[:, -new:]
    return out


def _extended(mask: torch.Tensor, layer: VirtualTokens) -> torch.Tensor:
    """The mask (B, T) with the virtual tokens: (B, n + T)."""
    extended: torch.Tensor = _inserted({"input_ids": mask, "attention_mask": mask}, layer)["attention_mask"]
    return extended


def _restored(inputs: dict[str, Any], starts: torch.Tensor, layer: VirtualTokens) -> dict[str, Any]:
    """The ids (B, T) with the virtual tokens where ``generate`` put placeholders."""
    ids = inputs.get("input_ids")
    if ids is None:
        return {}
    first = starts.repeat_interleave(ids.shape[0] // starts.shape[0], dim=0)  # rows of one example: beams, samples
    number = torch.arange(ids.shape[1], device=ids.device) - first
    virtual = (number >= 0) & (number < layer.count)
    return {"input_ids": torch.where(virtual, layer.first_id + number, ids)}


def _without(sequences: torch.Tensor, starts: torch.Tensor, count: int) -> torch.Tensor:
    """Token ids (B, n + T) without the ``count`` virtual tokens from each row's start: (B, T)."""
    first = starts.repeat_interleave(sequences.shape[0] // starts.shape[0], dim=0)
    slot = torch.arange(sequences.shape[1] - count, device=sequences.device).expand(sequences.shape[0], -1)
    return sequences.gather(1, torch.where(slot >= first, slot + count, slot))


def _starts(mask: torch.Tensor) -> torch.Tensor:
    """Where each row's left padding ends: mask (B, T) -> (B, 1)."""
    return (mask.long().cumsum(-1) == 0).sum(-1, keepdim=True)


def _bound(function: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    bound = inspect.signature(function).bind_partial(*args, **kwargs).arguments
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return dict(bound)


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def _length(inputs: dict[str, Any]) -> int:
    given = inputs.get("input_ids")
    return int((given if given is not None else inputs["inputs_embeds"]).shape[1])


def _cached_length(inputs: dict[str, Any]) -> int:
    cache = inputs.get("past_key_values")
    cache = inputs.get("cache") if cache is None else cache  # transformers 5.24's name of the argument
    return 0 if cache is None else int(cache.get_seq_length())


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Position of each token in its row, padding aside: (B, T)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _mask_of(ids: torch.Tensor, pad: int | None, eos: int | list[int] | None) -> torch.Tensor:
    """The attention mask that transformers infers when none is given: pad is padding unless it is EOS too."""
    if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        return torch.ones_like(ids)
    return (ids != pad).long()
