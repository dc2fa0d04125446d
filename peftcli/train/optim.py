"""The optimizer and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer
from peftcli.errors import AdapterError, UsageError
from peftcli.methods.learning_rates import rate_groups
from peftcli.schema import Training


def parameter_groups(
    tensors: Mapping[str, tuple[AdapterLayer, str, nn.Parameter]], training: Training
) -> list[dict[str, Any]]:
    """The adapter's tensors, as ``core.weights.named_tensors`` gives them, by their learning rates.

    Raises:
        UsageError: LoRA+ is wanted of a method that it says nothing about.
    """
    if training.loraplus_lr_ratio is None:
        return [{"params": [parameter for _, _, parameter in tensors.values()]}]
    rates = rate_of(training), training.loraplus_lr_ratio, training.loraplus_lr_embedding
    try:
        return [group for group in rate_groups(tensors, *rates) if group["params"]]
    except AdapterError as error:
        raise UsageError(error.message, key=f"training.{error.key}") from None


def rate_of(training: Training) -> float:
    """The learning rate, which ``recipe.rates`` has made a number."""
    assert training.learning_rate != "auto"
    return training.learning_rate


def build_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], training: Training, *, fused: bool = False
) -> torch.optim.Optimizer:
    """AdamW over parameters, or over groups of them.

    Args:
        parameters: What trains.
        training: The settings.
        fused: Whether one operation updates all, instead of some for each. The state is the same.
    """
    return torch.optim.AdamW(
        parameters,
        lr=rate_of(training),
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        weight_decay=training.weight_decay,
        fused=fused or None,
    )


def build_schedule(
    optimizer: torch.optim.Optimizer, training: Training, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of that name in transformers, over ``total_steps`` steps."""
    from transformers import get_scheduler

    warmup = training.warmup_steps or round(training.warmup_ratio * total_steps)
    return get_scheduler(training.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
