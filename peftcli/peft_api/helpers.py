"""PEFT's helpers: for a while scale LoRA, leave inputs as they are or keep DoRA's norms, merge tensors, and others."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftcli.adapters.load import find_adapter
from peftcli.core.layer import TrainedCopy, adapter_layers
from peftcli.errors import AdapterError, PeftcliError
from peftcli.methods.adalora.layers import AdaLoraLayer
from peftcli.methods.combinations import Combination, majority_mask
from peftcli.methods.lora.dora import CACHE
from peftcli.methods.lora.kappa import EXPERTS, condition_numbers_of_experts, condition_numbers_of_layers
from peftcli.methods.lora.lora import LoraLayer
from peftcli.peft_api.tuner import Tuner

Tensors = Sequence[torch.Tensor]
Weights = torch.Tensor | Sequence[float]


def check_if_peft_model(model_name_or_path: str | Path) -> bool:
    """Return whether a folder or hub repository is known here to contain an adapter that can be read."""
    try:
        _ = find_adapter(str(model_name_or_path)).config
    except PeftcliError:
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the strength of the model's LoRA and AdaLoRA adapters inside. Merging takes it along.

    Raises:
        AdapterError: the model has no such adapter.
        TypeError: ``multiplier`` is not a number.
    """
    if not isinstance(multiplier, (int, float)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    before = {
        layer: layer.scaling for layer in adapter_layers(model).values() if isinstance(layer, (LoraLayer, AdaLoraLayer))
    }
    if not before:
        raise AdapterError("scaling is only supported for models with `LoraLayer`s")
    for layer, scaling in before.items():
        layer.scaling = scaling * multiplier
    try:
        yield
    finally:
        for layer, scaling in before.items():
            layer.scaling = scaling


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Inside, LoRA layers take their inputs in the dtype that these have, as hooks that convert weights need it.

    Unless it is ``active``, nothing is changed.

    Raises:
        AdapterError: the model has no LoRA layers.
    """
    layers = [layer for layer in adapter_layers(model).values() if isinstance(layer, (LoraLayer, TrainedCopy))]
    if not layers:
        raise AdapterError("the model has no LoRA layers; the inputs of others are always converted")
    before = [layer.casts_input for layer in layers]
    for layer in layers:
        layer.casts_input = layer.casts_input and not active
    try:
        yield
    finally:
        for layer, casts in zip(layers, before, strict=True):
            layer.casts_input = casts


class MontecloraTrainerMixin:
    """Adds MonteCLoRA's penalty to the loss of a trainer: ``class MyTrainer(MontecloraTrainerMixin, Trainer): ...``."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        """The trainer's loss and the penalty; with ``return_outputs`` also the model's outputs."""
        trainer: Any = super()
        found = trainer.compute_loss(model, inputs, return_outputs=return_outputs, **options)
        loss, *outputs = found if return_outputs else (found,)
        for module in model.modules():
            if isinstance(module, Tuner):
                loss = loss + sum(penalty() for penalty in module.from_methods("_get_monteclora_loss"))
        return (loss, *outputs) if return_outputs else loss


class DoraCaching:
    """Keep the norms of DoRA in evaluation mode: faster, for more memory. Inside ``with``, or from a call to another.

    A norm is computed again when a weight that it depends on has changed.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled

    def __enter__(self) -> None:
        self.before, CACHE.enabled = CACHE.enabled, self.enabled

    def __exit__(self, *error: object) -> None:
        CACHE.enabled = self.before

    def __call__(self, enabled: bool = True) -> None:
        """Switch it on or off for the whole process."""
        CACHE.enabled = enabled


class KappaTuneSelector:
    """The weights of a model by their condition numbers, smallest first: see ``methods.lora.kappa``."""

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: Sequence[str] | None = None,
        show_progress: bool = True,
    ):
        """Compute nothing yet. There will be no progress bar.

        Weights with a side longer than ``max_dim_size_to_analyze`` are left out. ``moe_param_suffixes`` are endings of
        the names of fused experts.
        """
        self._model, self._largest, self._endings = model, max_dim_size_to_analyze, moe_param_suffixes or EXPERTS

    @functools.cached_property
    def _layers(self) -> dict[str, float]:
        return condition_numbers_of_layers(self._model, self._largest)

    @functools.cached_property
    def _experts(self) -> dict[str, float]:
        return condition_numbers_of_experts(self._model, self._largest, self._endings)

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Return the best ``target_modules``: a number of them, a share of all, or those up to a condition number."""
        return _best(self._layers, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Return the best ``target_parameters``, chosen in the same way."""
        return _best(self._experts, top_p, num_modules, threshold)


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: Sequence[str] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """Return the best ``target_modules`` and ``target_parameters`` of a config: a share ``top_p`` of all.

    The other arguments are those of ``KappaTuneSelector``.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }


def update_signature(model: Any, method: str = "all") -> None:
    """Let ``forward`` and ``generate`` of a PeftModel, or one of them, show the arguments of the model inside."""
    if method not in ("forward", "generate", "all"):
        raise AdapterError(f"must be forward, generate or all, not {method!r}", key="method")
    for name in ("forward", "generate") if method == "all" else (method,):
        _show_arguments(model, name)


def update_forward_signature(model: Any) -> None:
    """Let ``forward`` show the arguments of the model inside, unless it names its own."""
    _show_arguments(model, "forward")


def update_generate_signature(model: Any) -> None:
    """Let ``generate`` show the arguments of the model inside."""
    _show_arguments(model, "generate")


def _show_arguments(model: Any, method: str) -> None:
    own, shown = getattr(model, method), getattr(model.get_base_model(), method)
    if not {"args", "kwargs", "adapter_names"}.issuperset(inspect.signature(own).parameters):
        return

    @functools.wraps(shown)
    def call(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    setattr(model, method, call)


def _best(numbers: dict[str, float], share: float | None, count: int | None, largest: float | None) -> list[str]:
    names = sorted(numbers, key=numbers.__getitem__)
    if count is not None:
        return names[:count]
    if share is not None:
        return names[: max(1, int(len(names) * share))]
    return [name for name in names if largest is None or numbers[name] <= largest]


def task_arithmetic(task_tensors: Tensors, weights: Weights) -> torch.Tensor:
    """Return the weighted sum."""
    return _merge(Combination("linear"), task_tensors, weights)


def magnitude_prune(task_tensors: Tensors, weights: Weights, density: float) -> torch.Tensor:
    """Return the weighted sum of what is left of each tensor without its smallest values."""
    return _merge(Combination("magnitude_prune", density=density), task_tensors, weights)


def ties(task_tensors: Tensors, weights: Weights, density: float, majority_sign_method: str = "total") -> torch.Tensor:
    """Return the mean of the weighted values whose sign has the majority, small ones left out."""
    how = Combination("ties", density=density, majority_sign=majority_sign_method)
    return _merge(how, task_tensors, weights)


def dare_linear(task_tensors: Tensors, weights: Weights, density: float) -> torch.Tensor:
    """Return the weighted sum of what is left of each tensor without values that are drawn, the others enlarged."""
    return _merge(Combination("dare_linear", density=density), task_tensors, weights)


def dare_ties(
    task_tensors: Tensors, weights: Weights, density: float, majority_sign_method: str = "total"
) -> torch.Tensor:
    """Return what ``ties`` does, with values dropped at random as in ``dare_linear``."""
    how = Combination("dare_ties", density=density, majority_sign=majority_sign_method)
    return _merge(how, task_tensors, weights)


def prune(tensor: torch.Tensor, density: float, method: str, rescale: bool = False) -> torch.Tensor:
    """Return a tensor with a share ``density`` of its values left, above 0 and at most 1.

    Of ``magnitude`` the largest are left, of ``random`` any; ``rescale`` enlarges these, so that the expectation stays.

    Raises:
        AdapterError: no method is called that, or the share is another number.
    """
    if method not in ("magnitude", "random"):
        raise AdapterError(f"must be magnitude or random, not {method!r}", key="method")
    how = Combination("magnitude_prune" if method == "magnitude" else "dare_linear", density=density)
    pruned = _merge(how, [tensor], [1.0])
    return pruned if method == "magnitude" or rescale else pruned * density


def calculate_majority_sign_mask(tensor: torch.Tensor, method: str = "total") -> torch.Tensor:
    """Return which of stacked values (n, ...) have the sign of the majority: see ``Combination.majority_sign``.

    Raises:
        AdapterError: no method is called that.
    """
    Combination("ties", density=1.0, majority_sign=method).check()
    return majority_mask(tensor, method)


def disjoint_merge(task_tensors: torch.Tensor, majority_sign_mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over the first dimension of the values that the mask names; 0 where it names none."""
    return (task_tensors * majority_sign_mask).sum(0) / majority_sign_mask.sum(0).clamp(min=1)


def _merge(how: Combination, tensors: Tensors, weights: Weights) -> torch.Tensor:
    how.check()
    return how.merged(torch.stack(list(tensors)), [float(weight) for weight in weights])
