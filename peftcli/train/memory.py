"""What to change where the memory does not suffice."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from peftcli.errors import OutOfMemory, to_peftcli_error
from peftcli.schema import Training
from peftcli.train.report import peak_memory_bytes


def lacks_memory(error: BaseException) -> bool:
    """Whether an exception says that the device or the machine has too little memory."""
    return isinstance(to_peftcli_error(error), OutOfMemory)


def too_large_a_step(step: int, batches: Sequence[Sequence[int]], unit: str, training: Training) -> OutOfMemory:
    """The error of a step whose largest micro-batch did not fit.

    Args:
        step: Its number, from 1.
        batches: The sizes of the examples of each micro-batch.
        unit: What they count, as tokens.
        training: The settings.
    """
    largest = max(batches, key=sum)
    size = f"{len(largest):,} examples and {sum(largest):,} {unit}, {max(largest):,} of them in the longest"
    return OutOfMemory(
        f"not enough memory for step {step}, {_peak()}: a micro-batch of {size}", hint=_cheapest(training)
    )


def too_large_an_evaluation(training: Training) -> OutOfMemory:
    """The error of an evaluation that did not fit."""
    size = training.per_device_eval_batch_size
    less = f"training.per_device_eval_batch_size: {max(1, size // 2)}"
    message = f"not enough memory to evaluate, {_peak()}: a batch of {size:,} examples"
    return OutOfMemory(message, hint=less if size > 1 else "a smaller dataset.max_length")


def _peak() -> str:
    return f"after a peak of {max(peak_memory_bytes().values()) / 2**30:.1f} GiB"


def _cheapest(training: Training) -> str:
    """The three changes that cost least, the cheapest first."""
    size, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    parts = next((count for count in range(2, size + 1) if size % count == 0), 1)
    changes = {
        f"training.per_device_train_batch_size: {size // parts} with gradient_accumulation_steps: {steps * parts}, "
        "which changes no result": size > 1,
        "training.gradient_checkpointing: true, about a third slower": not training.gradient_checkpointing,
        "training.bf16: true": training.bf16 is False,
        "a smaller dataset.max_length": True,
        "base_model.quantization: nf4": True,
    }
    return "; or ".join(islice((text for text, helps in changes.items() if helps), 3))
