"""The layer of Poly (https://arxiv.org/abs/2202.13914)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.distributions import RelaxedBernoulli

from peftcli.errors import AdapterError
from peftcli.methods._delta import DeltaLinear, factory_kwargs
from peftcli.methods._task_ids import TaskLayer
from peftcli.methods._task_ids import attach as attach
from peftcli.methods.poly import PolyConfig


class Router(nn.Module):
    """The shares of the skills, by task: ``module_logits`` (tasks, splits * skills)."""

    def __init__(self, config: PolyConfig, like: dict[str, Any]):
        super().__init__()
        self.shape = (config.n_splits, config.n_skills)
        self.module_logits = nn.Parameter(torch.empty(config.n_tasks, config.n_splits * config.n_skills, **like))
        nn.init.uniform_(self.module_logits, -1e-3, 1e-3)

    def forward(self, tasks: torch.Tensor) -> torch.Tensor:
        """Return the shares of rows of these tasks, (B,) -> (B, splits, skills). While training they are drawn."""
        logits = self.module_logits[tasks].unflatten(1, self.shape)
        shares = (
            RelaxedBernoulli(torch.ones_like(logits), logits=logits).rsample() if self.training else logits.sigmoid()
        )
        return shares / (shares.sum(-1, keepdim=True) + 1e-12)


class PolyLinear(TaskLayer, DeltaLinear):
    """``y = W x + B A x / r``, with ``A: (r, in)`` and ``B: (out, r)`` the mixtures of the row's task.

    The skills are ``poly_lora_A: (splits, skills, in / splits, r)`` and ``poly_lora_B``, of the shape
    ``(splits, skills, r, out / splits)``.
    """

    def __init__(self, module: nn.Module, name: str, config: PolyConfig):
        super().__init__(module, name, "Poly")
        inputs, outputs, splits = self.view.in_features, self.view.out_features, config.n_splits
        if inputs % splits or outputs % splits:
            raise AdapterError(
                f"{name} has {inputs} inputs and {outputs} outputs, which do not divide by {splits}", key="n_splits"
            )
        like, shape, self.r = factory_kwargs(module), (splits, config.n_skills), config.r
        self.tasks, self.by_row = config.n_tasks, config.n_tasks == 1
        self.poly_lora_A = nn.Parameter(torch.empty(*shape, inputs // splits, config.r, **like))
        self.poly_lora_B = nn.Parameter(torch.zeros(*shape, config.r, outputs // splits, **like))
        self.poly_router = Router(config, like)
        for skills in (self.poly_lora_A,) if config.init_weights else (self.poly_lora_A, self.poly_lora_B):
            bound = 1 / math.sqrt(skills.shape[2])  # that of nn.Linear with as many inputs
            nn.init.uniform_(skills, -bound, bound)

    def mixtures(self, tasks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``A`` and ``B`` of rows of these tasks, transposed: (B, in, r) and (B, r, out)."""
        shares = self.poly_router(tasks)
        a = torch.einsum("bqs,qsdr->bqdr", shares, self.poly_lora_A).flatten(1, 2)
        return a, torch.einsum("bqs,qsrd->brqd", shares, self.poly_lora_B).flatten(2, 3)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.mixtures(self.tasks_of(x))
        rows = x.reshape(len(x), -1, x.shape[-1])
        return (rows @ a @ b / self.r).reshape(*x.shape[:-1], -1)

    def delta(self) -> torch.Tensor:
        a, b = self.mixtures(torch.zeros(1, dtype=torch.long, device=self.poly_lora_A.device))
        return (a @ b / self.r)[0].T


wrap = PolyLinear
