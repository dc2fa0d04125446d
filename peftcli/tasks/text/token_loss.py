"""The cross-entropy over target tokens, which the language-model tasks share."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

from peftcli.tasks.base import Loss
from peftcli.tasks.text.chat import IGNORED


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
