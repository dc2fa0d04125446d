"""The training loop of small base models: the demos' ones, and those of the scripts in configs/tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

_REPORT_STEPS = 100


def fit(
    parameters: Iterable[torch.nn.Parameter],
    loss: Callable[[], torch.Tensor],
    steps: int,
    rate: float,
    decay: float = 0.01,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Take ``steps`` steps of AdamW on new values of ``loss``; the rate rises for a tenth of them, then falls.

    Args:
        parameters: What is trained.
        loss: Called at each step, with a batch of its own.
        steps: Number of steps.
        rate: The largest learning rate.
        decay: Weight decay.
        tell: Is called with the mean loss of every 100 steps.
    """
    weights, started, total = list(parameters), time.perf_counter(), 0.0
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if tell:
            total += value.item()
            if step % _REPORT_STEPS == 0:
                tell(f"step {step} of {steps}: loss {total / _REPORT_STEPS:.3f}, {time.perf_counter() - started:.0f} s")
                total = 0.0
