"""PEFT's functions that make an optimizer for a model of ``get_peft_model``."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from peftcli.core.weights import named_tensors
from peftcli.errors import AdapterError
from peftcli.methods.learning_rates import rate_groups
from peftcli.methods.lora.optimizers import LoraFAOptimizer, MatrixPair, matrix_pairs, precondition
from peftcli.peft_api.initialisations import base_of

__all__ = [
    "LoraFAOptimizer",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
]


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = 1e-6,
    loraplus_weight_decay: float = 0.0,
    **options: Any,
) -> torch.optim.Optimizer:
    """An optimizer that trains LoRA's B ``loraplus_lr_ratio`` times as fast as A: LoRA+.

    It has PEFT's four groups, some maybe empty: A, which learns at ``lr``, LoRA on embeddings, B, and vectors, which
    learn as fast as B. The weight decay is that of all but vectors.

    Raises:
        AdapterError: the adapter has no B.
    """
    plain, larger, embedding = rate_groups(named_tensors(base_of(model)), lr, loraplus_lr_ratio, loraplus_lr_embedding)
    matrices = larger | {"params": [value for value in larger["params"] if value.ndim > 1]}
    vectors = larger | {"params": [value for value in larger["params"] if value.ndim == 1], "weight_decay": 0.0}
    groups = [group | {"weight_decay": loraplus_weight_decay} for group in (plain, embedding, matrices)]
    groups.append(vectors)
    return optimizer_cls(groups, lr=lr, **options)  # type: ignore[call-arg]


def create_lorafa_optimizer(
    model: nn.Module,
    r: int | None = None,
    lora_alpha: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFAOptimizer:
    """An AdamW that trains LoRA's B alone: LoRA-FA. A takes no gradients any more.

    On convolutions and embeddings, LoRA is trained as by AdamW. PEFT's ``r`` and ``lora_alpha`` are not needed, and
    ``use_rslora`` is what the adapters' configs say.

    Raises:
        AdapterError: the model has no LoRA on linear layers that trains, or ``use_rslora`` is not what a config says.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        if use_rslora not in (None, getattr(config, "use_rslora", False)):
            raise AdapterError(
                f"use_rslora={use_rslora} was passed to create_lorafa_optimizer; it is {not use_rslora} in the config "
                f"of {name}"
            )
    pairs = _pairs(model, "LoRA-FA")
    for pair in pairs:
        pair.a.requires_grad_(False)
    trained = [value for value in model.parameters() if value.requires_grad]
    return LoraFAOptimizer(trained, pairs, lr=lr, weight_decay=weight_decay)


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[torch.optim.Optimizer], *, lr: float, reg: float = 1e-2, **options: Any
) -> torch.optim.Optimizer:
    """An optimizer that multiplies the gradients of LoRA's A and B by small matrices before each step.

    ``reg`` is added to the diagonal of what these are the inverses of, which keeps them from being too large.

    Raises:
        AdapterError: the model has no LoRA on linear layers that trains, or the optimizer computes the loss itself,
            with gradients that would be left as they are.
        TypeError: ``optimizer_cls`` is no class of optimizers.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, not {optimizer_cls!r}")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise AdapterError(
            f"{optimizer_cls.__name__} requires a closure, which computes gradients anew", key="optimizer_cls"
        )
    pairs = _pairs(model, "Riemannian preconditioning")

    def prepare(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):  # the first is the optimizer
            raise AdapterError("step() does not support closures, which compute gradients anew")
        precondition(pairs, reg)

    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = optimizer_cls(trained, lr=lr, **options)  # type: ignore[call-arg]
    optimizer.register_step_pre_hook(prepare)
    return optimizer


def _pairs(model: nn.Module, what: str) -> list[MatrixPair]:
    if pairs := matrix_pairs(model):
        return pairs
    raise AdapterError(f"{what} needs lora_A/lora_B parameter pairs that train, on linear layers")
