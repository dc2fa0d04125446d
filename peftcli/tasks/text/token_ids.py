"""Token ids with labels: padded to batches, and the cross-entropy over their targets.

``fast.losses`` computes what ``plain_losses`` does in less time and memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.prompts.inputs import takes
from peftcli.data.store import Example
from peftcli.tasks.base import Loss
from peftcli.tasks.text.chat import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Losses = tuple[torch.Tensor, torch.Tensor]
"""The cross-entropy of each target, in float32 with gradients, and whether it was the model's first choice (in
training also whether it was one of several): (N,) each."""


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that pads rows: the pad token's, else EOS's, else 0.

    The choice changes nothing: attention mask and labels exclude padding by position, not by id.
    """
    tokens = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in tokens if token is not None)


def pad_labelled(examples: Sequence[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad ``input_ids``, ``labels`` and ``attention_mask`` on the right, each ``(B, T)``.

    Packed rows get ``position_ids`` instead of the mask, in which padding restarts at 0 like another example:
    transformers separates examples by restarting positions, and only without a mask.
    """
    batch = pad_texts([each.arrays["input_ids"] for each in examples], pad_token_id)
    batch["labels"] = padded([each.arrays["labels"] for each in examples], IGNORED)
    if "position_ids" in examples[0].arrays:
        width = batch.pop("attention_mask").shape[1]
        rows = [each.arrays["position_ids"] for each in examples]
        filled = [np.concatenate([row, np.arange(width - len(row))]) for row in rows]
        batch["position_ids"] = padded(filled, 0)
    return batch


def pad_texts(rows: Sequence[Sequence[int] | np.ndarray], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad rows of token ids on the right: ``input_ids`` and ``attention_mask``, each (B, T)."""
    mask = padded([np.ones(len(row), np.int64) for row in rows], 0)
    return {"input_ids": padded(rows, pad_token_id), "attention_mask": mask}


def padded(rows: Sequence[Sequence[int] | np.ndarray], filler: int) -> torch.Tensor:
    """Put rows of different lengths into one tensor (B, T), padded on the right."""
    padded = np.full((len(rows), max(map(len, rows))), filler, np.int64)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = row
    return torch.from_numpy(padded)


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Return the targets (B, T) of a causal model, which predicts the next token at each position."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def plain_losses(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], targets: torch.Tensor, temperature: float = 1.0
) -> Losses:
    """Run a language model; return the losses of the targets that count, row after row.

    ``model`` may be below a wrapper of accelerate's, and may have a soft prompt; ``targets`` (B, T) are those of its
    last T positions. ``temperature`` divides the logits.
    """
    return losses_of(target_logits(model, inputs, targets) / temperature, targets[targets != IGNORED])


def target_logits(model: nn.Module, inputs: Mapping[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """Run a model as ``plain_losses`` does; return the logits (N, V) of the targets that count, row after row."""
    given, counts = dict[str, Any](inputs), targets != IGNORED
    kept = counts.any(dim=0).nonzero().squeeze(1)
    if takes(inner_model(model), "logits_to_keep"):
        # counted from the end, since a soft prompt lengthens the front
        given["logits_to_keep"] = kept - targets.shape[1]
    logits = model(**given, **no_cache(model, inputs)).logits
    if "logits_to_keep" not in given:
        logits = logits[:, -targets.shape[1] :][:, kept]
    found: torch.Tensor = logits[counts[:, kept]]
    return found


def inner_model(model: nn.Module) -> Any:
    """The model below any wrapper of accelerate's."""
    return getattr(model, "module", model)


def no_cache(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, bool]:
    """Return arguments that turn the cache off, with which packed examples would not be looked for.

    Some models know none.
    """
    return {"use_cache": False} if takes(inner_model(model), "use_cache") or "position_ids" in inputs else {}


def is_half_precision(model: nn.Module) -> bool:
    """Whether some of a model's weights, which may be the base's below an adapter in float32, are in half precision."""
    return any(each.dtype in (torch.bfloat16, torch.float16) for each in model.parameters())


def losses_of(logits: torch.Tensor, targets: torch.Tensor) -> Losses:
    """Return the losses of logits (N, V) and targets (N,)."""
    logits = logits.float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1) == targets


def token_loss(losses: Losses) -> Loss:
    """Sum the losses of target tokens."""
    total, each = losses[0].sum(), {"loss": losses[0].detach(), "correct": losses[1]}
    return Loss(total, {"loss": total.detach(), "correct": losses[1].sum()}, of_targets=each)


def token_metrics(sums: Mapping[str, np.ndarray], num_targets: int) -> dict[str, float]:
    """Loss per target (natural logarithm), its exponential, and the share of targets that were the top choice."""
    loss, accuracy = (float(sums[name]) / num_targets for name in ("loss", "correct"))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": accuracy}
