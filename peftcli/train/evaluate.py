"""Metrics of a model on evaluation data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from peftcli.data.store import View
from peftcli.tasks.base import Task


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    features: View,
    tokenizer: Any,
    batch_size: int,
    accelerator: Accelerator,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """The task's metrics over all targets of ``features``, each name with the prefix ``eval_``.

    The result does not depend on the batch size or the number of processes, float error aside.

    Args:
        model: What is measured.
        task: What its losses are.
        features: The examples.
        tokenizer: The model's.
        batch_size: Examples at once in a process.
        accelerator: Of this process; all processes evaluate together.
        stopping: Is asked before each batch, by all processes as often, whether to give up.

    Returns:
        The metrics; None if it was given up.
    """
    was_training = model.training
    model.eval()
    order = np.argsort(features.lengths, kind="stable").tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    sums: dict[str, float] = {}
    inner = accelerator.unwrap_model(model)  # no gradients to synchronise, and the processes' batch counts may differ
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    rounds = -(-len(batches) // accelerator.num_processes)
    # a process without a batch counts one example zero times
    for indices in [*(mine or [order[:1]]), *[None] * (rounds - max(len(mine), 1))]:
        if stopping():
            model.train(was_training)
            return None
        if indices is None:
            continue
        batch = task.collate([features[index] for index in indices], tokenizer)
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        with accelerator.autocast():
            losses = task.losses(inner, batch)
        for name, value in losses.sums.items():
            sums[name] = sums.get(name, 0.0) + float(value) * bool(mine)
    model.train(was_training)
    total = torch.tensor([sums[name] for name in sorted(sums)], dtype=torch.float64, device=accelerator.device)
    reduced = accelerator.reduce(total, reduction="sum").tolist()
    metrics = task.metrics(dict(zip(sorted(sums), reduced, strict=True)), int(features.targets.sum()))
    return {f"eval_{name}": value for name, value in metrics.items()}
