"""The virtual tokens of multitask prompt tuning (https://arxiv.org/abs/2303.02861)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftcli.core.files import read_tensor_file
from peftcli.core.layer import adapter_dtype
from peftcli.core.prompts.virtual_tokens import VirtualTokens
from peftcli.core.prompts.virtual_tokens import attach as attach
from peftcli.core.prompts.virtual_tokens import targets as targets
from peftcli.errors import AdapterError
from peftcli.methods._task_ids import check_task_ids
from peftcli.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig
from peftcli.methods.prompt_tuning.layers import start


class MultitaskTokens(VirtualTokens):
    """Of each task, the shared vectors (n, D) times a factor of its own, number by number: ``cols @ rows``.

    ``prefix_task_cols`` is (tasks, n, r), ``prefix_task_rows`` (tasks, r, D).
    """

    def __init__(self, base_layer: nn.Module, tensors: dict[str, torch.Tensor]):
        tasks, count, _ = tensors["prefix_task_cols"].shape
        super().__init__(base_layer, count, tasks)
        dtype = adapter_dtype(self.base_layer.weight)
        for name, value in tensors.items():
            self.register_parameter(name, nn.Parameter(value.to(dtype)))

    def table(self) -> torch.Tensor:
        return (self.prompt_embeddings * (self.prefix_task_cols @ self.prefix_task_rows)).flatten(0, 1)

    def rows_of(self, task_ids: torch.Tensor | None, batch: int) -> torch.Tensor | None:
        if task_ids is None and self.tasks == 1:
            return None
        if task_ids is None:
            raise AdapterError(f"the prompt has {self.tasks} tasks; say the task of each row", key="task_ids")
        check_task_ids(task_ids, self.tasks, batch)
        return task_ids.expand(batch)[:, None]


def wrap(module: Any, name: str, config: MultitaskPromptTuningConfig) -> MultitaskTokens:
    """Virtual tokens over the input embedding ``module``, started as the config says."""
    config.fit(module)
    tasks, ranks, device = config.num_tasks, config.num_ranks, module.weight.device
    shared = start(module, config)
    tensors = {
        "prompt_embeddings": shared,
        "prefix_task_cols": 0.02 * torch.randn(tasks, len(shared), ranks, device=device),
        "prefix_task_rows": 0.02 * torch.randn(tasks, ranks, shared.shape[1], device=device),
    }
    if config.prompt_tuning_init_state_dict_path and not config.inference_mode:
        tensors |= _from_source(tensors, config, device)
    return MultitaskTokens(module, tensors)


def _from_source(
    tensors: dict[str, torch.Tensor], config: MultitaskPromptTuningConfig, device: torch.device
) -> dict[str, torch.Tensor]:
    """Read the starting values of ``tensors`` from the adapter that the config names."""
    path, key = Path(config.prompt_tuning_init_state_dict_path or ""), "prompt_tuning_init_state_dict_path"
    try:
        source = read_tensor_file(path)
    except AdapterError as error:
        raise AdapterError(error.message, file=str(path), key=key) from None
    names = ["prompt_embeddings"] if config.prompt_tuning_init == "ONLY_SOURCE_SHARED" else list(tensors)
    if missing := [name for name in names if name not in source]:
        raise AdapterError(f"holds no {missing[0]}", file=str(path), key=key)
    found = {name: source[name].to(device) for name in names}
    for name in names[1:]:
        found[name] = _one_task(found[name], config)
    for name, value in found.items():
        if value.shape != tensors[name].shape:
            expected, given = tuple(tensors[name].shape), tuple(value.shape)
            raise AdapterError(f"{name} is {given}, the settings ask for {expected}", file=str(path), key=key)
    return found


def _one_task(factors: torch.Tensor, config: MultitaskPromptTuningConfig) -> torch.Tensor:
    """The factors (tasks, ...) of one task, or their mean: (1, ...)."""
    if config.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
        return factors.mean(0, keepdim=True)
    task = config.prompt_tuning_init_task
    if task >= len(factors):
        raise AdapterError(f"{task}: the source's tasks are 0 to {len(factors) - 1}", key="prompt_tuning_init_task")
    return factors[task : task + 1]
