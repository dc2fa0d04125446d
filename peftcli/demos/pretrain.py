"""The training loop of the demos' small base models."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


def fit(parameters: Iterable[torch.nn.Parameter], loss: Callable[[], torch.Tensor], steps: int, rate: float) -> None:
    """Take ``steps`` steps of AdamW on new values of ``loss``; the rate rises for a tenth of them, then falls."""
    weights = list(parameters)
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        loss().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
