"""Whether a model keeps the examples of a packed row apart. Some do not, and would be trained on what they leak."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from accelerate import Accelerator

from peftcli.errors import ModelError
from peftcli.models.probe import deviation, probing
from peftcli.tasks.base import Batch, Packs, Task, model_inputs, on_device

_EXACT, _ROUNDED = 1e-3, 0.3
"""How far a token's logits may be off by rounding, in float32 and in less, relative to the logits' spread. Seen over 30
layers were 1e-5 and 0.1; where examples of a trained model saw each other, 0.15 and more."""
_LEAKED = 0.02
"""How far they may be off in less than float32 beside another example, in a row of the same shape: seen was 0."""


def refuse_contamination(model: Any, task: Task[Any], accelerator: Accelerator) -> None:
    """Compare the logits of two examples in packed rows, in both orders, with those of each alone, and beside another.

    Raises:
        ModelError: they differ.
    """
    parameters = inspect.signature(model.forward).parameters
    takes = "position_ids" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    if model.config.is_encoder_decoder or not takes:
        raise _refusal(model)
    assert isinstance(task, Packs)
    one, other = task.samples()
    examples = [one, other, other, one, other, other]
    rows = [task.join(examples[at : at + 2]) for at in (0, 2, 4)]
    alone = _logits(model, task.collate(examples, training=True), accelerator)
    packed = _logits(model, task.collate(rows, training=True), accelerator).view_as(alone)
    exact = packed.dtype == torch.float32 and accelerator.mixed_precision == "no"
    after_one, after_other = packed[1], packed[5]
    off, leaked = deviation(packed, alone), deviation(after_one, after_other, alone)
    if not (off <= (_EXACT if exact else _ROUNDED) and leaked <= (_EXACT if exact else _LEAKED)):
        raise _refusal(model)


def _logits(model: Any, batch: Batch, accelerator: Accelerator) -> torch.Tensor:
    """Logits (B, T, V) in evaluation mode. Leaves the modules' modes and the random state as they were."""
    inputs = model_inputs(on_device(batch, accelerator.device))
    with probing(model, accelerator.device), accelerator.autocast():
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits


def _refusal(model: Any) -> ModelError:
    return ModelError(
        f"{type(model).__name__} with {model.config._attn_implementation} attention does not keep the examples of a "
        "packed row apart: they would be trained on one another",
        key="dataset.packing",
        hint="set dataset.packing: false",
    )
