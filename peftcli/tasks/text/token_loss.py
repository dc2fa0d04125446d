"""The cross-entropy over target tokens, which the language-model tasks share."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from peftcli.tasks.base import Loss
from peftcli.tasks.text.chat import IGNORED


def target_logits(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run a causal language model.

    Args:
        model: Maybe below a wrapper of accelerate's, and maybe with a soft prompt.
        inputs: Its arguments.
        labels: (B, T); the first ones are never predicted.

    Returns:
        The logits (B, N, V) at the positions of which some row has a target, their targets (B, N), and which they are
        of the T - 1 positions: (N,). A model that cannot leave any out gives all.
    """
    targets = labels[:, 1:]  # (B, T - 1): position t predicts token t + 1
    given, length = dict[str, Any](inputs), targets.shape[1]
    if _picks_logits(model):
        # logits only where some row has a target; counted from the end, since a soft prompt lengthens the front
        kept = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
        given["logits_to_keep"] = kept - (length + 1)
        return model(**given, use_cache=False).logits, targets[:, kept], kept
    if "position_ids" in given:
        given["use_cache"] = False  # transformers looks for packed examples only where there is no cache
    logits = model(**given).logits[:, -(length + 1) : -1]
    return logits, targets, torch.arange(length, device=targets.device)


def _picks_logits(model: nn.Module) -> bool:
    """Whether the model, below any wrapper of accelerate's, computes logits at chosen positions only."""
    inner = getattr(model, "module", model)
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> Loss:
    """Summed cross-entropy of logits (B, T, V) at the positions whose targets (B, T) count, in float32."""
    counts = targets != IGNORED
    chosen, wanted = logits[counts].float(), targets[counts]  # (N, V), (N,)
    loss = F.cross_entropy(chosen, wanted, reduction="sum")
    with torch.no_grad():
        correct = (chosen.argmax(-1) == wanted).sum()
    return Loss(loss, {"loss": loss.detach(), "correct": correct})


def token_metrics(sums: Mapping[str, np.ndarray], num_targets: int) -> dict[str, float]:
    """Loss per target (natural logarithm), its exponential, and the share of targets that were the top choice."""
    loss, accuracy = (float(sums[name]) / num_targets for name in ("loss", "correct"))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": accuracy}
