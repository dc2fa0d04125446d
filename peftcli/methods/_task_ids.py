"""The task of each row, for adapters whose result depends on it: ``model(..., task_ids=...)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer
from peftcli.core.prompts.generate import generate as generate_with_prompt
from peftcli.core.prompts.inputs import SoftPrompt, hook_once
from peftcli.errors import AdapterError
from peftcli.methods._delta import layers_of_kind


@dataclass
class TaskIds:
    """What all layers of a model share."""

    of_call: torch.Tensor | None = None
    """While the model's forward runs: its task_ids."""
    of_generation: torch.Tensor | None = None
    """The same while ``generate`` runs."""


class TaskLayer(AdapterLayer):
    """A layer whose result depends on the task of each row."""

    tasks: int
    """How many tasks there are."""
    task_ids: TaskIds

    def tasks_of(self, x: torch.Tensor) -> torch.Tensor:
        """Return the task of each row of ``x``, (B, ..., in) -> (B,).

        Rows that come from one of the caller's, beams or windows, stand side by side.

        Raises:
            AdapterError: the caller gave none, and there are several tasks, or they do not fit.
        """
        given = self.task_ids.of_call if self.task_ids.of_call is not None else self.task_ids.of_generation
        if given is None and self.tasks > 1:
            raise AdapterError(
                f"the adapter has {self.tasks} tasks; say the task of each row. Gradient checkpointing, which computes "
                "layers again after the call, works with one task only",
                key="task_ids",
            )
        if given is None or self.tasks == 1:
            return torch.zeros(len(x), dtype=torch.long, device=x.device)
        if len(x) % len(given):
            raise AdapterError(f"{len(given)} tasks for {len(x)} rows; give one a row, or one for all", key="task_ids")
        return given.to(x.device).repeat_interleave(len(x) // len(given))


def check_task_ids(task_ids: Any, tasks: int, rows: int) -> None:
    """Raise AdapterError unless these are tasks, one for each of the rows, or one for all: (B,) or (1,)."""
    if not isinstance(task_ids, torch.Tensor):
        raise AdapterError(f"must be a tensor, not {task_ids!r}", key="task_ids", hint="torch.tensor([0, 1])")
    if task_ids.shape not in ((rows,), (1,)) or task_ids.is_floating_point():
        raise AdapterError(
            f"must be {rows} whole numbers, one a row, or one for all rows, not {task_ids!r}", key="task_ids"
        )
    if (task_ids < 0).any() or (task_ids >= tasks).any():
        raise AdapterError(f"{task_ids.tolist()}: the adapter's tasks are 0 to {tasks - 1}", key="task_ids")


def attach(model: nn.Module, config: Any, layers: Mapping[str, Any]) -> None:
    """Let the model's forward take ``task_ids``, for the new ``layers`` and those of other adapters in it."""
    shared = next((layer.task_ids for layer in _layers(model) if "task_ids" in vars(layer)), TaskIds())
    for layer in layers.values():
        layer.task_ids = shared
    hook_once(model, _take)
    hook_once(model, _forget, after=True)


def generate(model: Any, *args: Any, task_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """``generate`` of ``core.prompts.generate``, for rows of these tasks: (B,), or (1,) for all.

    Raises:
        AdapterError: they are no tasks of the model's adapters.
    """
    layers = _layers(model)
    if task_ids is not None and not layers and not any(isinstance(each, SoftPrompt) for each in model.modules()):
        raise AdapterError("no adapter of this model has tasks; leave task_ids out", key="task_ids")
    _check(layers, task_ids, model, args, kwargs)
    for layer in layers[:1]:
        layer.task_ids.of_generation = task_ids
    try:
        return generate_with_prompt(model, *args, task_ids=task_ids, **kwargs)
    finally:
        for layer in layers[:1]:
            layer.task_ids.of_generation = None


def _take(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """The model's forward pre-hook. It finds the layers anew, since the model may be a copy."""
    layers = _layers(model)
    if not layers:
        return None
    layers[0].task_ids.of_call = None  # a call that raised has left its own
    if "task_ids" not in kwargs:
        return None
    kwargs = dict(kwargs)
    task_ids = kwargs.pop("task_ids")
    _check(layers, task_ids, model, args, kwargs)
    layers[0].task_ids.of_call = task_ids
    return args, kwargs


def _forget(model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """The model's forward hook: the next call has rows of its own."""
    for layer in _layers(model)[:1]:
        layer.task_ids.of_call = None


def _layers(model: nn.Module) -> list[TaskLayer]:
    """Return the layers that have tasks. All of them share their ``task_ids``."""
    return list(layers_of_kind(model, TaskLayer).values())


def _check(layers: list[TaskLayer], task_ids: Any, model: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    if task_ids is None:
        return
    names = ("inputs", getattr(model, "main_input_name", "input_ids"), "input_ids", "inputs_embeds")
    first = next((value for value in [*args[:1], *map(kwargs.get, names)] if value is not None), task_ids)
    for tasks in {layer.tasks for layer in layers if layer.enabled}:
        check_task_ids(task_ids, tasks, len(first))
