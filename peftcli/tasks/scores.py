"""A batch through a model, and what the model says of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftcli.tasks.base import Batch, model_inputs, on_device, scores_of
from peftcli.tasks.text.token_ids import inner_model

_POSITIONS, _OF_HIDDEN_STATES = 32, 3
"""Places in a text whose logits are compared, and the dimensions of hidden states: rows, positions, width."""


def as_computed(model: Any, batch: Batch) -> Batch:
    """Return the batch with sounds and pictures in the model's number format, where the model has one."""
    dtype = getattr(inner_model(model), "dtype", None)
    if not isinstance(dtype, torch.dtype):
        return batch
    return {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() and value.ndim > 1 else value
        for name, value in batch.items()
    }


def scores_on(model: Any, batch: Batch, *, bf16: bool) -> torch.Tensor:
    """Put a model into evaluation mode, and return what it says of a batch, padding aside: float32, on the CPU.

    Of long texts it is what a language model says at a few places.
    """
    model.eval()
    device = next(model.parameters()).device
    inputs = as_computed(model, model_inputs(on_device(batch, device)))
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not decodes:
        inputs.pop("labels", None)  # whose decoder reads them
    mask = inputs.get("attention_mask")
    with (
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        _few_positions(model, 0 if decodes or mask is None else mask.shape[1]) as few,
    ):
        scores = scores_of(model(**inputs)).float().cpu()
    mask = mask[:, few] if mask is not None and few else mask
    if decodes or mask is None or scores.ndim <= mask.ndim or scores.shape[1] < mask.shape[1]:
        return scores
    return scores[:, -mask.shape[1] :][mask.bool().cpu()]  # virtual tokens stand before


@contextmanager
def _few_positions(model: Any, length: int) -> Iterator[list[int]]:
    """Inside, the output head sees a few positions of texts of this length; yields them, empty where it sees all.

    The logits of all may take more memory than training does.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    seen: list[int] = []
    if head is None or length <= _POSITIONS:
        yield seen
        return
    few = torch.linspace(0, length - 1, _POSITIONS).long()

    def choose(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].ndim != _OF_HIDDEN_STATES or args[0].shape[1] < length:
            return None
        seen[:] = few.tolist()
        return (args[0][:, few.to(args[0].device) - length], *args[1:])  # virtual tokens stand before

    hook = head.register_forward_pre_hook(choose)
    try:
        yield seen
    finally:
        hook.remove()
