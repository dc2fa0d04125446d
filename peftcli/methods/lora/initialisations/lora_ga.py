"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation (https://arxiv.org/abs/2407.05000)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from peftcli.core.inject import evaluating
from peftcli.errors import AdapterError
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.initialisations import LoraGAConfig
from peftcli.methods.lora.initialisations.start import (
    PADDED,
    Batches,
    Pair,
    check_directions,
    check_reached,
    first_batches,
)

_EXAMPLES = 64
"""As many as the paper's code takes."""


def lora_ga(weight: torch.Tensor, gradient: torch.Tensor, r: int, scaling: float, config: LoraConfig) -> Pair:
    """Return A and B from the leading 2r singular vectors of the weight's gradient (out, in).

    They are scaled as in the paper. PEFT leaves A as it is and multiplies B by the singular values too.
    """
    check_directions(weight, 2 * r)
    settings = config.lora_ga_config or LoraGAConfig()
    u, _, v = torch.svd_lowrank(gradient.to(weight.dtype), q=min(4 * r, *gradient.shape), niter=4)
    orders = {
        "ArB2r": torch.arange(2 * r),
        "A2rBr": torch.arange(2 * r).roll(r),
        "ArBr": torch.arange(2 * r).view(r, 2).T.flip(0).flatten(),
    }
    order = orders[settings.direction] if settings.direction in orders else torch.randperm(2 * r)
    size = 1.0
    if settings.scale == "stable":
        size = len(weight) ** 0.25 / math.sqrt(settings.stable_gamma)
    elif settings.scale == "weight_svd":
        size = float((torch.svd_lowrank(weight, q=r, niter=4)[1] / scaling).sqrt().mean())
    elif settings.scale == "gd_scale":
        size = 1 / scaling
    return size * v[:, order[:r].to(v.device)].T, size * u[:, order[r:].to(u.device)]


def gradients_of(model: nn.Module, modules: Mapping[str, nn.Module], batches: Batches) -> dict[str, torch.Tensor]:
    """Return ``gradients`` of the model's own loss over the first of these batches."""

    def backward() -> None:
        for batch in first_batches(batches, _EXAMPLES):
            loss = getattr(model(**batch), "loss", None)
            if loss is None:
                message = "lora_ga starts from gradients of the model's own loss, and the task has another"
                raise AdapterError(message, key="init_lora_weights")
            # the mean of a batch's targets counts as often as it has targets, as in training
            labels = batch.get("labels")
            targets = len(next(iter(batch.values()))) if labels is None else int((labels != PADDED).sum())
            (loss * targets).backward()

    return gradients(model, modules, backward)


def gradients(model: nn.Module, modules: Mapping[str, nn.Module], run: Callable[[], None]) -> dict[str, torch.Tensor]:
    """Return the sum of the gradients (out, in) of each linear module's weight while ``run`` calls ``backward``.

    They are computed from inputs and gradients of outputs, so the weights may be quantised, and nothing else of the
    model gets a gradient.

    Raises:
        AdapterError: a module gets no gradient.
    """
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
        def watch(_module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
            x = args[0].detach().flatten(end_dim=-2)
            y = y if y.requires_grad else y.detach().requires_grad_()

            def add(gradient: torch.Tensor) -> None:
                product = gradient.flatten(end_dim=-2).float().T @ x.float()
                sums[name] = sums[name] + product if name in sums else product

            y.register_hook(add)
            return y

        return watch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            run()
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
    check_reached(modules, sums)
    return sums
