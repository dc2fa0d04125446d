"""The peak memory of a process, and what to change where the memory does not suffice."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from peftcli.errors import OutOfMemory
from peftcli.schema import Recipe
from peftcli.system.memory import peak_resident_memory
from peftcli.tasks.base import Task

_TO_GO_ON = ". To go on at the last checkpoint, add --allow-change KEY"


def peak_memory_bytes() -> dict[str, int]:
    """The peak memory of this process: resident, and on the GPU if there is one."""
    peak = {"rss": peak_resident_memory()}
    if torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def too_large_a_step(step: int, sizes: Sequence[int], recipe: Recipe, task: Task[Any], *, saved: bool) -> OutOfMemory:
    """The error of a step that the memory did not hold.

    ``sizes`` are those of the examples that were in the model at once when most were, in the task's unit; ``saved``:
    there is a checkpoint.
    """
    longest = f" with {sum(sizes):,} {task.unit}, {max(sizes):,} in the longest" if max(sizes) > 1 else ""
    batch = f"{len(sizes):,} example{'s' if len(sizes) > 1 else ''} at once{longest}"
    hint = f"{_cheapest(recipe, task, len(sizes))}{_TO_GO_ON * saved}"
    return OutOfMemory(f"not enough memory for step {step}, {_peak()}: {batch}", hint=hint)


def too_large_an_evaluation(recipe: Recipe, *, saved: bool) -> OutOfMemory:
    """The error of an evaluation that the memory did not hold. ``saved``: there is a checkpoint."""
    size = recipe.training.per_device_eval_batch_size
    less = f"training.per_device_eval_batch_size: {size // 2}" if size > 1 else "leave out the largest examples"
    message = f"not enough memory to evaluate, {_peak()}: a batch of {size:,} examples"
    return OutOfMemory(message, hint=f"{less}{_TO_GO_ON * saved}")


def _peak() -> str:
    peak = peak_memory_bytes()
    return f"after a peak of {peak.get('cuda', peak['rss']) / 2**30:.1f} GiB"


def _cheapest(recipe: Recipe, task: Task[Any], at_once: int) -> str:
    """The three changes that cost least, the cheapest first, where ``at_once`` examples in the model are too many."""
    training = recipe.training
    size, steps = training.rows_at_once, training.gradient_accumulation_steps
    parts = next((count for count in range(2, size + 1) if size % count == 0 and size // count < at_once), 1)
    fewer = f"training.per_device_train_batch_size: {size // parts}"
    same = f"{fewer} with gradient_accumulation_steps: {steps * parts}, the same batch in smaller parts"
    changes = {
        # a task that compares the rows of a batch learns less from fewer
        same if task.divides else fewer: parts > 1,
        "training.gradient_checkpointing: true, about a third slower": not training.gradient_checkpointing,
        "training.bf16: true": training.bf16 is False,
        "a smaller dataset.max_length": task.unit == "tokens",
        "base_model.quantization: nf4": recipe.base_model.quantization is None,
    }
    return "; or ".join(islice((text for text, helps in changes.items() if helps), 3))
