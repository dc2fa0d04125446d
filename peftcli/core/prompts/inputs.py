"""Insert virtual tokens into a model's inputs: after each row's left padding, as if they had been typed there."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer, base_module, layers_at
from peftcli.core.prompts.config import max_positions
from peftcli.errors import AdapterError

IGNORED = -100
"""The label of a position that does not count."""
_UNCOUNTED = 1 << 30
STATES = {"state": "use_cache", "cache_params": "use_cache", "mems": "use_mems"}
"""Arguments with a state that virtual tokens cannot continue, and the settings that leave each of them out."""


@dataclass(frozen=True)
class Insertion:
    """Where virtual tokens go in a batch (B, T)."""

    start: torch.Tensor
    """Where each row's left padding ends: (B, 1)."""
    length: int
    count: int

    @property
    def number(self) -> torch.Tensor:
        """The number of the virtual token in each slot (B, n + T); any outside of 0 to n - 1 is a slot of ids."""
        return torch.arange(self.count + self.length, device=self.start.device) - self.start

    @property
    def virtual(self) -> torch.Tensor:
        """The slots that virtual tokens take: (B, n + T)."""
        return (self.number >= 0) & (self.number < self.count)

    def spread(self, value: torch.Tensor, filler: torch.Tensor | int) -> torch.Tensor:
        """Return ``value`` (B, T) or (B, T, D) with room for the virtual tokens: (B, n + T) or (B, n + T, D)."""
        slot = torch.arange(self.count + self.length, device=value.device)
        source = torch.where(slot >= self.start + self.count, slot - self.count, slot).clamp(max=self.length - 1)
        virtual = self.virtual if value.ndim == 2 else self.virtual[..., None]
        return torch.where(virtual, filler, _tokens_at(value, source))

    def first(self, value: torch.Tensor) -> torch.Tensor:
        """Return the first token's part of each row of ``value``, (B, T) or (B, T, D): (B, 1) or (B, 1, D)."""
        return _tokens_at(value, self.start.clamp(max=self.length - 1))

    def moved(self, index: torch.Tensor) -> torch.Tensor:
        """Return indices of tokens, (B,) or (B, 1), as they are after the insertion."""
        start = self.start if index.ndim == 2 else self.start[:, 0]
        return torch.where(index >= start, index + self.count, index)


class SoftPrompt(AdapterLayer):
    """The base of the layers of all soft prompts. One soft prompt of a model can be active at a time."""

    count: int
    """Number of virtual tokens."""
    placeholders: torch.Tensor | None = None
    """While ``generate`` runs: where the virtual tokens start in each row (B, 1)."""
    task_ids: torch.Tensor | None = None
    """While ``generate`` runs: the task of each row (B,), if the prompt has several."""
    chunks = True
    """Whether the first forward pass may be cut into chunks."""
    decodes = False
    """Whether the virtual tokens of an encoder-decoder are put before what the decoder reads."""
    by_row = False
    longest: int | None = None
    """How many tokens, virtual ones included, the model has positions for; None: unknown."""
    counts = False
    """Whether positions are counted from the mask, padding aside, where the caller gives none."""

    def insertion(self, inputs: dict[str, Any]) -> Insertion:
        """Return where the virtual tokens go in the inputs of a forward call.

        Raises:
            AdapterError: there are not enough positions, or the padding is unknown, or images are marked.
        """
        given, mask = tokens_of(inputs), inputs.get("attention_mask")
        if (kinds := inputs.get("mm_token_type_ids")) is not None and kinds.any():
            raise AdapterError(
                "marks images, whose positions or masks leave no place for virtual tokens",
                key="mm_token_type_ids",
                hint="choose another method, such as lora",
            )
        batch, length = given.shape[:2]
        if self.longest is not None and length + self.count > self.longest:
            raise AdapterError(
                f"{length} tokens and {self.count} virtual ones; the base model has {self.longest} positions",
                key="num_virtual_tokens",
            )
        if mask is None:
            return Insertion(torch.zeros(batch, 1, dtype=torch.long, device=given.device), length, self.count)
        if isinstance(mask, torch.Tensor) and mask.shape == (batch, length):
            return Insertion(starts(mask), length, self.count)
        raise AdapterError("virtual tokens need a two-dimensional attention_mask; generate through peftcli's model")

    def begin(self, model: nn.Module, inputs: dict[str, Any]) -> Insertion:
        """Return the ``insertion`` where a sequence starts, and add to ``inputs`` the positions that it needs."""
        mask = inputs.get("attention_mask")
        if self.counts and mask is not None and inputs.get("position_ids") is None and takes(model, "position_ids"):
            inputs["position_ids"] = positions(mask)
        inputs.pop("cache_position", None)  # counted without virtual tokens; models find it by themselves
        return self.insertion(inputs)

    def file_name(self, path: str, tensor: str) -> str:
        return tensor

    def rows_of(self, task_ids: torch.Tensor | None, batch: int) -> torch.Tensor | None:
        """Return the task of each row (B, 1), from what the caller gave; None: there are no tasks.

        Raises:
            AdapterError: they do not fit.
        """
        if task_ids is not None:
            raise AdapterError("this adapter has one prompt for all tasks; leave task_ids out", key="task_ids")
        return None


def inserted(
    inputs: dict[str, Any],
    insertion: Insertion,
    ids: torch.Tensor | None = None,
    vectors: torch.Tensor | None = None,
    *,
    token_labels: bool = True,
) -> dict[str, Any]:
    """Return the inputs with room for the virtual tokens, which get ``ids`` (B, n + T) or ``vectors`` (B, n + T, D).

    Args:
        inputs: of a forward call, by name.
        insertion: where the virtual tokens go.
        ids: unset, each virtual token is the first row's first token once more.
        vectors: what stands for ``ids`` where the inputs are embeddings.
        token_labels: whether labels (B, T) are labels of tokens.
    """
    shape, out = (len(insertion.start), insertion.length), dict[str, Any]()
    if (given := inputs.get("input_ids")) is not None:
        out["input_ids"] = insertion.spread(given, insertion.first(given)[:1] if ids is None else ids)
    elif (given := inputs.get("inputs_embeds")) is not None:
        out["inputs_embeds"] = insertion.spread(
            given, insertion.first(given)[:1] if vectors is None else vectors.to(given.dtype)
        )
    if (mask := inputs.get("attention_mask")) is not None:
        out["attention_mask"] = insertion.spread(mask, 1)
    if (position := inputs.get("position_ids")) is not None:
        if position.ndim != 2:
            raise AdapterError("virtual tokens need position_ids of two dimensions", key="position_ids")
        after = insertion.number >= insertion.count
        out["position_ids"] = (
            insertion.spread(position, insertion.first(position) + insertion.number) + insertion.count * after
        )
    if (types := inputs.get("token_type_ids")) is not None:
        out["token_type_ids"] = insertion.spread(types, 0)
    labels = inputs.get("labels")
    if token_labels and labels is not None and labels.shape == shape and not labels.is_floating_point():
        out["labels"] = insertion.spread(labels, IGNORED)
    for name in ("start_positions", "end_positions"):
        if (index := inputs.get(name)) is not None:
            out[name] = insertion.moved(index)
    return out


def continued(model: nn.Module, inputs: dict[str, Any], past: int, count: int) -> dict[str, Any]:
    """Return what changes in the inputs of a later step, so that they count the virtual tokens in the cache."""
    mask, new = inputs.get("attention_mask"), tokens_of(inputs).shape[1]
    out: dict[str, Any] = {}
    if (place := inputs.get("cache_position")) is not None:  # of transformers before 5.24 or so
        out["cache_position"] = torch.arange(past, past + new, device=place.device)
    if mask is None or mask.ndim != 2 or mask.shape[1] != past + new - count:
        return out
    out["attention_mask"] = mask = extended(mask, count)
    if (position := inputs.get("position_ids")) is not None:
        out["position_ids"] = position + count
    elif takes(model, "position_ids"):
        out["position_ids"] = positions(mask)[:, -new:]
    return out


def extended(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Return the mask (B, T) with the virtual tokens: (B, n + T)."""
    return Insertion(starts(mask), mask.shape[1], count).spread(mask, 1)


def without(values: torch.Tensor, start: torch.Tensor, count: int) -> torch.Tensor:
    """Return values (B, n + T) or (B, n + T, D) without those of the virtual tokens: (B, T) or (B, T, D).

    Of several rows that come from one example, beams or samples, all start where it does.
    """
    first = start.repeat_interleave(values.shape[0] // start.shape[0], dim=0)
    slot = torch.arange(values.shape[1] - count, device=values.device)
    return _tokens_at(values, torch.where(slot >= first, slot + count, slot))


def _tokens_at(value: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the parts of ``value``, (B, T) or (B, T, D), of the tokens at ``index`` (B, n)."""
    value = value.expand(len(index), *value.shape[1:])  # never more rows than the batch
    return torch.take_along_dim(value, index if value.ndim == 2 else index[..., None], dim=1)


def starts(mask: torch.Tensor) -> torch.Tensor:
    """Return where each row's left padding ends: mask (B, T) -> (B, 1)."""
    return (mask.long().cumsum(-1) == 0).sum(-1, keepdim=True)


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Return the position of each token in its row, padding not counted: (B, T)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def bound(function: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name."""
    signature = inspect.signature(function)
    arguments = signature.bind_partial(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return dict(arguments)


def takes(module: nn.Module, argument: str) -> bool:
    """Return whether the module's forward has that argument."""
    return argument in inspect.signature(module.forward).parameters


def tokens_of(inputs: dict[str, Any]) -> torch.Tensor:
    """Return the input ids (B, T), or the embeddings (B, T, D) that stand for them."""
    return inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]


def cached_length(inputs: dict[str, Any]) -> int:
    """Return how many tokens the cache in the inputs holds; a very large number if the cache does not count them.

    Raises:
        AdapterError: the model keeps another kind of state.
    """
    if any(inputs.get(name) is not None for name in STATES):
        todo = "set use_cache=False, of XLNet use_mems=False"
        raise AdapterError(f"virtual tokens cannot go on from this model's kind of state; {todo}")
    cache = inputs.get("past_key_values")
    cache = inputs.get("cache") if cache is None else cache  # transformers 5.24's name of the argument
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:  # it has no attention layer
        return _UNCOUNTED * int(cache.has_previous_state())


def hook_once(module: nn.Module, hook: Any, *, after: bool = False) -> None:
    """Register a hook before or after forward, unless an adapter, there still or unloaded, has left the same one."""
    if after and hook not in module._forward_hooks.values():
        module.register_forward_hook(hook, with_kwargs=True)
    if not after and hook not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook, with_kwargs=True)


def active_at(module: nn.Module, kind: type[SoftPrompt]) -> Any:
    """Return the enabled layer of that kind among the adapter layers at ``module``, or None.

    Raises:
        AdapterError: there are two.
    """
    found = [layer for layer in layers_at(module) if isinstance(layer, kind) and layer.enabled]
    if len(found) > 1:
        raise AdapterError("two soft prompts are active; set one of them active")
    return found[0] if found else None


def soft_prompt(model: nn.Module) -> SoftPrompt | None:
    """Return the model's active soft prompt, or None."""
    return next((module for module in model.modules() if isinstance(module, SoftPrompt) and module.enabled), None)


def position_tables(model: Any) -> list[nn.Embedding]:
    """Return the model's embeddings of positions."""
    rows = getattr(model.config, "max_position_embeddings", None) or 0
    words = base_module(model.get_input_embeddings())
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words]
    # OPT and its like keep up to two rows for padding
    return [table for table in tables if 0 < rows <= table.weight.shape[0] <= rows + 2]


def set_positions(layer: SoftPrompt, model: Any, *, counts: bool) -> None:
    """Set how the layer counts positions in this model. ``counts``: whether they start after the padding."""
    tables = position_tables(model)
    layer.longest = max_positions(model.config) if tables else None
    layer.counts = counts and all(table.padding_idx is None for table in tables)  # those with one count by themselves
