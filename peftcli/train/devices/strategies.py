"""Which of ``launch.strategy`` a task and a method can be trained with."""

from __future__ import annotations

from typing import Any

import torch

from peftcli.core.config import AdapterConfig
from peftcli.core.protocols import layers_of
from peftcli.errors import UsageError
from peftcli.schema import DIVIDED, Recipe
from peftcli.tasks.base import Begins, Task, require_extra

STAGES = {"zero2": 2, "zero3": 3}
"""launch.strategy -> the stage of ZeRO."""
_ENGINES = ("ddp", "zero2", "zero3")
_QUANTISED = {"fsdp": ("nf4", "fp4"), "zero3": ()}
"""launch.strategy -> the quantised weights that it can divide: their scales stand beside them, whole."""
_NOT_WHOLE = {"zero2": ("int8_weight_only", "int4_weight_only", "torchao")}
"""launch.strategy -> those that it cannot even hold whole."""
_ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Values of training.optim that update each number by itself."""


def is_dividing(recipe: Recipe) -> bool:
    """Whether this process and others divide the base model among them."""
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return several and recipe.launch.strategy in DIVIDED


def may_divide(task: Task[Any]) -> bool:
    """Whether the model of a task can be divided: one of texts, if the task does not compare the rows of a batch."""
    return task.unit == "tokens" and not task.gathers


def supports_quantization(strategy: str, weight_type: str | None) -> bool:
    """Whether a strategy is for weights that are quantised so, or not at all."""
    if weight_type is None:
        return True
    divides = strategy not in _QUANTISED or weight_type in _QUANTISED[strategy]
    return divides and weight_type not in _NOT_WHOLE.get(strategy, ())


def refuse_strategy(recipe: Recipe, task: Task[Any], config: AdapterConfig, num_processes: int) -> None:
    """Check that the recipe's strategy works for its task, its method and the number of processes.

    Raises:
        UsageError: it is not, or DeepSpeed is not installed.
    """
    strategy, method, weight_type = recipe.launch.strategy, layers_of(config), task.base.weight_type
    weights_fit = supports_quantization(strategy, weight_type)
    refused = (
        ((*_QUANTISED, *_NOT_WHOLE), not weights_fit, f"is not for {weight_type}"),
        (DIVIDED, not may_divide(task), "divides models of texts, whose task does not compare the rows of a batch"),
        (_ENGINES, task.gathers, "is not for tasks that compare the rows of all processes"),
        (("zero3",), isinstance(task, Begins), "is not for tasks that compare the model with what it was"),
        (("zero3",), config.reads_past_calls(), "is for LoRA without its variants: other methods read divided weights"),
        (("zero2", "zero3"), "after_step" in vars(method), "leaves no gradients, which the method reads after a step"),
    )
    for strategies, is_so, text in refused:
        if strategy in strategies and is_so:
            hint = "launch.strategy: replicate"
            raise UsageError(f"{strategy} {text}", key="launch.strategy", hint=hint)
    if strategy in DIVIDED and recipe.launch.cpu_offload and num_processes == 1:
        raise UsageError("one process has no part of the model to offload", key="launch.cpu_offload")
    if strategy in STAGES and recipe.training.optim not in _ELEMENTWISE:
        text = f"{strategy} divides what adamw_torch and sgd remember, and no other optimizer"
        raise UsageError(text, key="training.optim")
    if strategy in STAGES and num_processes > 1:
        require_extra("deepspeed", "deepspeed", "launch.strategy", UsageError)
