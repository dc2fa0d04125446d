"""The optimizer and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from peftcli.schema import Training


def build_optimizer(parameters: Iterable[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """AdamW over the adapter's parameters."""
    return torch.optim.AdamW(
        list(parameters),
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        weight_decay=training.weight_decay,
    )


def build_schedule(
    optimizer: torch.optim.Optimizer, training: Training, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of that name in transformers, over ``total_steps`` steps."""
    from transformers import get_scheduler

    warmup = training.warmup_steps or round(training.warmup_ratio * total_steps)
    return get_scheduler(training.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
