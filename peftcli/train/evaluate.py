"""Metrics of a model on evaluation data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from peftcli.data.store import View
from peftcli.tasks.base import Task


@torch.no_grad()
def evaluate(
    model: nn.Module, task: Task, features: View, tokenizer: Any, batch_size: int, accelerator: Accelerator
) -> dict[str, float]:
    """The task's metrics over all targets of ``features``, each name with the prefix ``eval_``.

    The result does not depend on the batch size or the number of processes, float error aside.
    """
    was_training = model.training
    model.eval()
    order = np.argsort(features.lengths, kind="stable").tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    sums: dict[str, float] = {}
    inner = accelerator.unwrap_model(model)  # no gradients to synchronise, and the processes' batch counts may differ
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    for indices in mine or [order[:1]]:  # a process without a batch counts one example zero times
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
