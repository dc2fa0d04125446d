"""The optimizer and the learning-rate schedule."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer, TrainedCopy, base_module
from peftcli.data.rows import count_of
from peftcli.errors import AdapterError, UsageError, to_peftcli_error
from peftcli.methods.learning_rates import rate_groups
from peftcli.schema import Training
from peftcli.tasks.base import require_extra

_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm(\.|$)|_norm(\.|$)")
"""Names of biases and weights of norms, as Trainer tells them, which also leaves out those of ``nn.LayerNorm``."""


def parameter_groups(
    tensors: Mapping[str, tuple[AdapterLayer, str, nn.Parameter]], training: Training
) -> list[dict[str, Any]]:
    """The adapter's tensors, as ``core.weights.named_tensors`` gives them, by their learning rates and decay.

    Raises:
        UsageError: LoRA+ is wanted of a method that it says nothing about.
    """
    groups: list[dict[str, Any]] = [{"params": [parameter for _, _, parameter in tensors.values()]}]
    if training.loraplus_lr_ratio is not None:
        rates = rate_of(training), training.loraplus_lr_ratio, training.loraplus_lr_embedding
        try:
            groups = rate_groups(tensors, *rates)
        except AdapterError as error:
            raise UsageError(error.message, key=f"training.{error.key}") from None
    if training.weight_decay:
        kept = {
            parameter
            for name, (layer, tensor, parameter) in tensors.items()
            if _NOT_DECAYED.search(name.lower()) or isinstance(_owner(layer, tensor), nn.LayerNorm)
        }
        groups = [
            {**group, **more, "params": [each for each in group["params"] if (each in kept) == bool(more)]}
            for group in groups
            for more in ({}, {"weight_decay": 0.0})
        ]
    return [group for group in groups if group["params"]]


def keep_embeddings_exact(optimizer: Any, tensors: Mapping[str, tuple[AdapterLayer, str, nn.Parameter]]) -> None:
    """Let an optimizer of bitsandbytes remember of embeddings that train in full 32 bits a number, as Trainer does."""
    if not hasattr(optimizer, "mng"):
        return
    optimizer.mng = object.__new__(type(optimizer.mng))  # one of its own: that of all would keep what runs before left
    optimizer.mng.initialize()
    for layer, tensor, _ in tensors.values():
        if _is_embedding(layer, tensor):
            optimizer.mng.register_module_override(_owner(layer, tensor), "weight", {"optim_bits": 32})


def _is_embedding(layer: AdapterLayer, tensor: str) -> bool:
    """Whether a tensor that trains is the weight of an embedding."""
    return isinstance(layer, TrainedCopy) and isinstance(_owner(layer, tensor), nn.Embedding)


def _owner(layer: AdapterLayer, tensor: str) -> Any:
    """The module that holds a trained parameter, or for a layer that trains others of its own, the adapted one."""
    return layer.copy.get_submodule(tensor.rpartition(".")[0]) if isinstance(layer, TrainedCopy) else base_module(layer)


def rate_of(training: Training) -> float:
    """The learning rate, which ``recipe.rates`` has made a number."""
    assert training.learning_rate != "auto"
    return training.learning_rate


@dataclass(frozen=True)
class _Optimizer:
    """A class of a library."""

    module: str
    name: str
    state_bytes: int
    """Remembered of each number that trains; what is kept by row or column does not count."""
    reads: tuple[str, ...] = ()
    """Which of AdamW's settings it has."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that say which of its kinds is meant."""
    adds: str = ""
    """The argument with which it remembers 4 bytes more."""


AVERAGES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""What an optimizer remembers in the shape of what it trains."""
_ADAM, _BITSANDBYTES = ("betas", "eps"), "bitsandbytes.optim"
_OPTIMIZERS = {
    "adamw_torch": _Optimizer("torch.optim", "AdamW", 8, _ADAM, adds="amsgrad"),
    "adamw_torch_fused": _Optimizer("torch.optim", "AdamW", 8, _ADAM, {"fused": True}, adds="amsgrad"),
    "adamw_8bit": _Optimizer(_BITSANDBYTES, "AdamW", 2, _ADAM, {"optim_bits": 8}),
    "paged_adamw_8bit": _Optimizer(_BITSANDBYTES, "AdamW", 2, _ADAM, {"optim_bits": 8, "is_paged": True}),
    "paged_adamw_32bit": _Optimizer(_BITSANDBYTES, "AdamW", 8, _ADAM, {"is_paged": True}),
    "lion_8bit": _Optimizer(_BITSANDBYTES, "Lion", 1, ("betas",), {"optim_bits": 8}),
    "lion_32bit": _Optimizer(_BITSANDBYTES, "Lion", 4, ("betas",)),
    "paged_lion_8bit": _Optimizer(_BITSANDBYTES, "Lion", 1, ("betas",), {"optim_bits": 8, "is_paged": True}),
    "paged_lion_32bit": _Optimizer(_BITSANDBYTES, "Lion", 4, ("betas",), {"is_paged": True}),
    "adafactor": _Optimizer(
        "transformers.optimization",
        "Adafactor",
        0,
        fixed={"scale_parameter": False, "relative_step": False},
        adds="beta1",
    ),
    "sgd": _Optimizer("torch.optim", "SGD", 0, adds="momentum"),
}
"""training.optim -> what it is."""


def state_bytes(tensors: Mapping[str, tuple[AdapterLayer, str, nn.Parameter]], training: Training) -> int:
    """Return how many bytes the optimizer remembers of the adapter's tensors, about."""
    kind = _OPTIMIZERS[training.optim]
    more = 4 if training.optim_args.get(kind.adds) else 0
    in_full = 4 if kind.fixed.get("optim_bits") == 8 else 1  # times as much of embeddings
    return sum(
        parameter.numel() * (kind.state_bytes * (in_full if _is_embedding(layer, tensor) else 1) + more)
        for layer, tensor, parameter in tensors.values()
    )


def build_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], training: Training
) -> torch.optim.Optimizer:
    """The optimizer that a recipe names, over parameters or over groups of them.

    Raises:
        UsageError: its package is not installed, or it does not take ``training.optim_args``.
    """
    wanted = _OPTIMIZERS[training.optim]
    if wanted.module == _BITSANDBYTES:
        require_extra("bitsandbytes", "bitsandbytes", "training.optim", UsageError)
    build = getattr(importlib.import_module(wanted.module), wanted.name)
    adam = {"betas": (training.adam_beta1, training.adam_beta2), "eps": training.adam_epsilon}
    own = {name: adam[name] for name in wanted.reads}
    given: dict[str, Any] = {"lr": rate_of(training), "weight_decay": training.weight_decay, **own, **wanted.fixed}
    if training.optim == "adamw_torch" and not training.optim_args.keys() & {"fused", "foreach", "differentiable"}:
        given["fused"] = True  # all values in one operation
    defaults = {name: each.default for name, each in inspect.signature(build).parameters.items() if name != "params"}
    for name, value in training.optim_args.items():
        key = f"training.optim_args.{name}"
        if name in given:
            raise UsageError(f"other settings of the recipe give {training.optim} its {name}", key=key)
        if name not in defaults:
            left = ", ".join(sorted(defaults.keys() - given.keys()))
            raise UsageError(f"{training.optim} has no such argument; it has {left}", key=key)
        is_switch = isinstance(defaults[name], bool)
        if isinstance(value, str) or (is_switch and value not in (0, 1)):
            raise UsageError(f"cannot be {value!r}; its default is {defaults[name]}", key=key)
        given[name] = bool(value) if is_switch else value  # fused optimizers take no number for it
    with _translated_errors(training):
        optimizer: torch.optim.Optimizer = build(parameters, **given)
    return optimizer


def check_optimizer(training: Training) -> None:
    """Check the optimizer's settings, before there is anything to train.

    Raises:
        UsageError: its package is not installed, or it does not take ``training.optim_args``.
    """
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    optimizer = build_optimizer([weight], training)
    may_need_gpu = _OPTIMIZERS[training.optim].module == _BITSANDBYTES or training.optim_args.get("capturable")
    if not may_need_gpu:
        with _translated_errors(training):
            optimizer.step()


@contextmanager
def _translated_errors(training: Training) -> Iterator[None]:
    """Inside, what an optimizer raises is an error of ``training.optim_args``."""
    try:
        yield
    except Exception as error:
        if to_peftcli_error(error) is not None:
            raise
        raise UsageError(f"{training.optim} says: {error}", key="training.optim_args") from None


def build_schedule(
    optimizer: torch.optim.Optimizer, training: Training, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of that name in transformers, over ``total_steps`` steps."""
    from transformers import get_scheduler

    kind, warmup = training.lr_scheduler_type, _warmup(training, total_steps)
    if kind == "polynomial":  # which divides by the steps after the warm-up
        total_steps = max(total_steps, warmup + 1)
    return get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)


def unfinished_warmup(training: Training, total_steps: int) -> list[str]:
    """A warning where the warm-up is as long as the run, or longer; of one step, the rate is 0."""
    if (warmup := _warmup(training, total_steps)) < max(total_steps, 1):
        return []
    steps = count_of(warmup, "step")
    return [f"the warm-up takes {steps} and the run has {total_steps:,}: it ends below training.learning_rate"]


def _warmup(training: Training, total_steps: int) -> int:
    """The number of warm-up steps."""
    steps = training.warmup_steps
    return int(steps) if steps >= 1 else math.ceil((steps or training.warmup_ratio) * total_steps)
