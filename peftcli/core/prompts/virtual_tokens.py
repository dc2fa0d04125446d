"""Virtual tokens: trained vectors that stand before the input.

A virtual token is a token id past the base model's vocabulary. ``insert_virtual_tokens`` puts those ids into the
input once, where the sequence starts, and the layer over the input embedding gives them their trained vectors. To
the model they are ordinary tokens, so positions, attention masks, every kind of cache and beam search need no care.
They stand after a row's left padding, so each row of a padded batch computes what it computes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import AdapterLayer, adapter_dtype, base_module, base_modules, model_ends, name_in
from peftcli.core.prompts.config import EmbeddedPromptConfig
from peftcli.core.prompts.inputs import (
    Insertion,
    SoftPrompt,
    active_at,
    bound,
    cached_length,
    continued,
    extended,
    hook_once,
    inserted,
    set_positions,
    starts,
    tokens_of,
    without,
)
from peftcli.errors import AdapterError


class VirtualTokens(SoftPrompt):
    """An input embedding that knows more ids than the vocabulary has: (B, T) -> (B, T, D).

    Id ``V + task * n + i`` is the task's virtual token ``i``. Most prompts have one task only.
    """

    token_labels = True
    """Whether labels of the inputs' shape are labels of tokens."""

    def __init__(self, base_layer: nn.Module, count: int, tasks: int = 1):
        super().__init__(base_layer)
        self.count, self.tasks = count, tasks

    @property
    def first_id(self) -> int:
        """Id of the first virtual token: the size of the base vocabulary."""
        return int(self.base_layer.weight.shape[0])

    def table(self) -> torch.Tensor:
        """The vectors of the virtual tokens, task after task: (tasks * n, D)."""
        raise NotImplementedError

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return self.base_layer(ids)
        tokens = self.base_layer(ids.clamp(max=self.first_id - 1))
        virtual = F.embedding((ids - self.first_id).clamp(min=0), self.table()).to(tokens.dtype)
        return torch.where((ids >= self.first_id).unsqueeze(-1), virtual, tokens)

    def numbers(self, insertion: Insertion, task_ids: torch.Tensor | None) -> torch.Tensor:
        """Return the row of the table for each virtual slot: (B, n + T)."""
        rows = self.rows_of(task_ids, len(insertion.start))
        return insertion.number.clamp(0, self.count - 1) + (0 if rows is None else rows * self.count)


class TrainedTokens(VirtualTokens):
    """Virtual tokens whose vectors (n, D) are what trains."""

    def __init__(self, base_layer: nn.Module, vectors: torch.Tensor):
        super().__init__(base_layer, len(vectors))
        self.prompt_embeddings = nn.Parameter(vectors.to(adapter_dtype(self.base_layer.weight)))

    def table(self) -> torch.Tensor:
        return self.prompt_embeddings

    def adapt_from_file(self, tensor: str, value: torch.Tensor) -> torch.Tensor:
        # PEFT allocates the rows twice for encoder-decoder models and trains the first half
        return value[: self.count] if value.shape == (2 * self.count, self.prompt_embeddings.shape[1]) else value


def targets(model: nn.Module, config: EmbeddedPromptConfig) -> list[str]:
    """Return the name of the model's input embedding, the only module that virtual tokens adapt.

    Raises:
        AdapterError: the model looks ids up elsewhere too, as DeepSeek-V4 does for its experts.
    """
    config.check_room(model)
    vocabulary = len(base_module(_embedding(model)).weight)
    for path, module in base_modules(model).items():  # and no tables of other adapters
        for name, table in module.named_buffers(recurse=False):
            if table.dtype == torch.long and table.ndim == 2 and len(table) == vocabulary:
                raise AdapterError(
                    f"{path}.{name} is a table of the vocabulary, which has no rows for virtual tokens",
                    hint="choose another method, such as lora",
                )
    return [input_embedding_name(model)]


def attach(model: nn.Module, config: EmbeddedPromptConfig, layers: Mapping[str, AdapterLayer]) -> None:
    """Start the model's inputs with the virtual tokens of the new layer."""
    for layer in layers.values():
        insert_virtual_tokens(model, cast("VirtualTokens", layer), token_labels=config.task_type != "SEQ_CLS")


def input_embedding_name(model: Any) -> str:
    """Return the path of the module that embeds the ids of the input: an encoder-decoder's encoder reads it.

    Raises:
        AdapterError: the model reads no ids.
    """
    return name_in(model, _embedding(model))


def insert_virtual_tokens(model: Any, layer: VirtualTokens, *, token_labels: bool = True) -> None:
    """Insert the virtual tokens of ``layer`` in every forward call of ``model`` that starts a sequence.

    Logits of each token come back for the tokens of the input only, unless the model generates text. ``token_labels``:
    whether labels of the inputs' shape are labels of tokens.
    """
    layer.token_labels = token_labels
    set_positions(layer, model, counts=generates(model))
    reader = _reader(model)
    path = name_in(reader, _embedding(model))
    hook_once(reader, _Insert(path, encodes=reader is not model))
    if reader is not model:
        hook_once(model, _Extend(input_embedding_name(model)))
    elif model.base_model is not model and not generates(model):
        hook_once(model, _Cut(path), after=True)


@dataclass(frozen=True)
class _Insert:
    """The forward pre-hook of the model or encoder that reads the input.

    Holds a path, not the layer: a copied model's hook finds the copy's layer, and one hook serves every adapter.
    """

    path: str
    encodes: bool
    """Whether it is an encoder inside an encoder-decoder."""

    def __call__(self, model: Any, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]] | None:
        layer = _active(model.get_submodule(self.path))
        if layer is None:
            return None
        kwargs = dict(kwargs)
        task_ids = kwargs.pop("task_ids", layer.task_ids)
        if self.encodes:
            layer.task_ids = None  # as _Extend or generate left them for this one call
        inputs = bound(model.forward, args, kwargs)
        past = cached_length(inputs)
        if layer.placeholders is not None:
            return (), inputs | _restored(inputs, layer.placeholders, past, task_ids, layer)
        if past:
            return (), inputs | continued(model, inputs, past, layer.count)
        if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
            return None
        mask = inputs.get("attention_mask")
        if self.encodes and mask is not None and mask.shape[1] == tokens_of(inputs).shape[1] + layer.count:
            inputs["attention_mask"] = without(mask, starts(mask), layer.count)  # _Extend was here first
        insertion = layer.begin(model, inputs)
        numbers = layer.numbers(insertion, task_ids)
        vectors = None if inputs.get("inputs_embeds") is None else F.embedding(numbers, layer.table())
        new = inserted(inputs, insertion, layer.first_id + numbers, vectors, token_labels=layer.token_labels)
        return (), inputs | new


@dataclass(frozen=True)
class _Extend:
    """The forward pre-hook of an encoder-decoder, whose decoder attends to what the encoder read."""

    path: str

    def __call__(self, model: Any, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]] | None:
        layer = _active(model.get_submodule(self.path))
        if layer is None:
            return None
        kwargs = dict(kwargs)
        layer.task_ids = kwargs.pop("task_ids", None)
        inputs = bound(model.forward, args, kwargs)
        mask, encoded = inputs.get("attention_mask"), inputs.get("encoder_outputs")
        if mask is not None and (encoded is None or mask.shape[1] != encoded[0].shape[1]):
            inputs["attention_mask"] = extended(mask, layer.count)
        return (), inputs


@dataclass(frozen=True)
class _Cut:
    """The forward hook of a model with a head for each token: its logits are those of the tokens of the input."""

    path: str

    def __call__(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = _active(model.get_submodule(self.path))
        if layer is None or not layer.token_labels:
            return
        if not isinstance(output, dict):
            raise AdapterError("virtual tokens need return_dict=True", key="return_dict")
        length, mask = tokens_of(kwargs).shape[1], kwargs.get("attention_mask")
        for name in ("logits", "start_logits", "end_logits"):
            logits = output.get(name)
            if logits is not None and logits.ndim == (3 if name == "logits" else 2) and logits.shape[1] == length:
                start = torch.zeros(len(logits), 1, dtype=torch.long) if mask is None else starts(mask)
                output[name] = without(logits, start.to(logits.device), layer.count)


def _active(embedding: Any) -> VirtualTokens | None:
    """Return the active virtual tokens over an input embedding, or None."""
    layer: VirtualTokens | None = active_at(embedding, VirtualTokens)
    while layer is not None and embedding is not layer:
        if embedding.enabled and not isinstance(embedding, SoftPrompt):
            raise AdapterError("another adapter of the input embedding stands around the soft prompt; load that last")
        embedding = embedding.base_layer
    return layer


def generates(model: nn.Module) -> bool:
    """Return whether the model generates text."""
    return hasattr(model, "prepare_inputs_for_generation")


def _reader(model: Any) -> Any:
    """Return the module that takes the input ids."""
    return model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model


def _embedding(model: Any) -> nn.Module:
    """Return the input embedding of the reader of ``model``. T5's encoder has its own, which shares its weight."""
    reader = _reader(model)
    owners, inside = [reader, model], base_modules(reader).values()  # FSMT's encoder leaves it to the model to say
    if hasattr(reader, "get_encoder"):
        owners.insert(0, reader.get_encoder())
    for owner in owners:
        embedding: Any = model_ends(owner)[0]
        if isinstance(base_module(embedding), nn.Embedding) and base_module(embedding) in inside:
            return embedding
    raise AdapterError(f"{type(reader).__name__} reads no token ids: there is no place for virtual tokens")


def _restored(
    inputs: dict[str, Any], start: torch.Tensor, past: int, task_ids: torch.Tensor | None, layer: VirtualTokens
) -> dict[str, Any]:
    """Return the ids (B, T) with the virtual tokens where ``generate`` put placeholders."""
    ids = inputs.get("input_ids")
    if ids is None:
        return {}
    copies = ids.shape[0] // start.shape[0]  # rows of one example: beams, samples
    insertion = Insertion(start.repeat_interleave(copies, dim=0) - past, ids.shape[1] - layer.count, layer.count)
    if task_ids is not None and len(task_ids) > 1:
        task_ids = task_ids.repeat_interleave(copies, dim=0)
    return {"input_ids": torch.where(insertion.virtual, layer.first_id + layer.numbers(insertion, task_ids), ids)}
