"""The cross-entropy over target tokens, which the language-model tasks share.

``fast.losses`` computes what ``plain_losses`` does in less time and memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.prompts.inputs import takes
from peftcli.tasks.base import Loss
from peftcli.tasks.text.chat import IGNORED

Losses = tuple[torch.Tensor, torch.Tensor]
"""The cross-entropy of each target, in float32 with gradients, and whether it was the model's first choice (in
training also whether it was one of several): (N,) each."""


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Return the targets (B, T) of a causal model, which predicts the next token at each position."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def plain_losses(model: nn.Module, inputs: Mapping[str, torch.Tensor], targets: torch.Tensor) -> Losses:
    """Run a language model; return the losses of the targets that count, row after row.

    ``model`` may be below a wrapper of accelerate's, and may have a soft prompt; ``targets`` (B, T) are those of its
    last T positions.
    """
    given, counts = dict[str, Any](inputs), targets != IGNORED
    kept = counts.any(dim=0).nonzero().squeeze(1)
    if takes(inner_model(model), "logits_to_keep"):
        # counted from the end, since a soft prompt lengthens the front
        given["logits_to_keep"] = kept - targets.shape[1]
    logits = model(**given, **no_cache(model, inputs)).logits
    if "logits_to_keep" not in given:
        logits = logits[:, -targets.shape[1] :][:, kept]
    return losses_of(logits[counts[:, kept]], targets[counts])


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
    total = losses[0].sum()
    return Loss(total, {"loss": total.detach(), "correct": losses[1].sum()})


def token_metrics(sums: Mapping[str, np.ndarray], num_targets: int) -> dict[str, float]:
    """Loss per target (natural logarithm), its exponential, and the share of targets that were the top choice."""
    loss, accuracy = (float(sums[name]) / num_targets for name in ("loss", "correct"))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": accuracy}
