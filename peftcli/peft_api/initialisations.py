"""PEFT's functions that start a LoRA adapter in a way of its own, over a model of ``get_peft_model``.

A recipe needs none of them: ``peftcli train`` does what ``init_lora_weights`` says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from peftcli.core.files import read_tensor_file, write_tensor_file
from peftcli.core.inject import inject, unload
from peftcli.core.layer import base_module, outer_modules
from peftcli.core.linear import Linear, linear_view
from peftcli.core.targets import targets
from peftcli.errors import AdapterError
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.initialisations import CordaConfig
from peftcli.methods.lora.initialisations.corda import covariances
from peftcli.methods.lora.initialisations.eva import eva_directions, start_eva
from peftcli.methods.lora.initialisations.loftq import start_loftq
from peftcli.methods.lora.initialisations.lora_ga import gradients
from peftcli.methods.lora.initialisations.residual import STATISTIC
from peftcli.methods.lora.lora import LoraLayer, lora_layers
from peftcli.models.open import BaseWeights, open_base
from peftcli.peft_api.tuner import find_tuner
from peftcli.schema import BaseModel

_WHILE_LEARNING = "eva-directions"
"""Name of the adapter that a base model has while its directions are learnt."""


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, torch.Tensor] | None = None,
    forward_fn: Callable[[Any, Any], Any] | None = None,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Start a model of ``get_peft_model`` whose config says ``init_lora_weights="eva"``.

    It reads batches until the directions are known, or takes what ``get_eva_state_dict`` gave; see that for the others.

    Raises:
        AdapterError: the config says otherwise, or the data do not suffice.
    """
    if (dataloader is None) == (eva_state_dict is None):
        raise AdapterError("EVA needs either a dataloader or an eva_state_dict")
    if eva_state_dict is None:
        assert dataloader is not None
        eva_state_dict = get_eva_state_dict(model, dataloader, forward_fn=forward_fn, adapter_name=adapter_name)
    base, config = _parts(model, adapter_name, "eva")
    directions = {name.removeprefix(config.file_prefix): value for name, value in eva_state_dict.items()}
    start_eva(base, config, lora_layers(base, adapter_name), directions)


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[Any, Any], Any] | None = None,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, torch.Tensor]:
    """Return EVA's directions (r, in) of each layer, as many as the layer is to get.

    A base model, also one in ``DistributedDataParallel``, is left as it was, and the directions have its names.

    Args:
        model: a model of ``get_peft_model``, or a base model.
        dataloader: the batches.
        peft_config: for a base model, the config that ``get_peft_model`` is to get.
        forward_fn: runs the model, its first argument, on a batch; None: the batch is the model's keyword arguments.
        adapter_name: which adapter.
        gather_distributed_inputs: PEFT's; inputs are never gathered: give each process the same batches.
        show_progress_bar: PEFT's; none is shown.

    Raises:
        AdapterError: the config says otherwise, or the data do not suffice.
    """
    batches = _OnDevice(dataloader, next(model.parameters()).device)
    run = forward_fn and partial(forward_fn, model)
    if hasattr(model, "peft_config"):
        base, config = _parts(model, adapter_name, "eva")
        found = eva_directions(base, config, lora_layers(base, adapter_name), batches, run)
        return {config.file_prefix + name: value for name, value in found.items()}
    if peft_config is None:
        raise AdapterError("is needed for a base model", key="peft_config")
    _check_start(peft_config, "eva")
    with _adapted(model, peft_config) as layers:
        return eva_directions(model, peft_config, layers, batches, run)


def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Learn what CorDA starts from; ``get_peft_model(model, lora_config)`` comes next.

    Args:
        model: the base model.
        lora_config: says ``init_lora_weights="corda"``. If ``corda_config`` names a ``cache_file`` or a
            ``covariance_file``, what is learnt is kept in it, in safetensors, and read from it the next time.
        run_model: runs the model on examples of the data, 256 or so. May be left out where such a file is there.
        hooked_model: the model that ``run_model`` runs, if it is another one: a copy of the base model.

    Raises:
        AdapterError: the config says otherwise, the data do not reach a layer, or the file is not one of this model.
    """
    modules, views = _targets(model, lora_config, "corda")
    settings = lora_config.corda_config or CordaConfig()

    def learn() -> dict[str, torch.Tensor]:
        if run_model is None:
            raise AdapterError("is needed, since there is no file of an earlier run", key="run_model")
        watched = hooked_model or model
        return covariances(watched, _targets(watched, lora_config, "corda")[0], run_model)

    shapes = {name: (view.in_features, view.in_features) for name, view in views.items()}
    _leave_at_layers(modules, settings.cache_file or settings.covariance_file, shapes, learn)


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], Any],
    cache_file: str | Path | None = None,
) -> None:
    """Learn what LoRA-GA starts from; ``get_peft_model(model, lora_config)`` comes next.

    ``train_step`` calls ``backward`` on the losses of a few batches. It must not change the model. ``cache_file`` keeps
    what is learnt, in safetensors; where it is there already, it is read instead.

    Raises:
        AdapterError: the config says otherwise, the data do not reach a layer, or the file is not one of this model.
    """
    modules, views = _targets(model, lora_config, "lora_ga")
    shapes = {name: (view.out_features, view.in_features) for name, view in views.items()}
    _leave_at_layers(modules, cache_file, shapes, lambda: gradients(model, modules, train_step))


def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Start a LoRA adapter on a quantised base model from what quantisation took away.

    ``model_path`` is that of the base model in full precision; None: where the model was loaded from. ``callback`` is
    given the model and a layer's name after each layer; where it says False, the layer is put back.

    Raises:
        AdapterError: no layer is quantised.
        ModelError: the full weights cannot be read.
    """
    base, _ = _parts(peft_model, adapter_name)
    where = str(model_path or getattr(base, "name_or_path", ""))
    opened = open_base(BaseModel(name=where.removesuffix("/model.safetensors")))
    weights = BaseWeights(opened, getattr(base, "base_model_prefix", ""))
    keep = callback or (lambda model, name: True)
    start_loftq(base, weights, adapter_name, lambda name: keep(peft_model, name))


@dataclass(frozen=True)
class _OnDevice:
    """Batches, with their tensors on a device; as often as they are gone through."""

    batches: Iterable[Any]
    device: torch.device

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            yield send_to_device(batch, self.device)


def _parts(model: Any, adapter_name: str, init: str | None = None) -> tuple[nn.Module, LoraConfig]:
    """Return what a model of ``get_peft_model`` wraps, and the adapter's config."""
    config = model.peft_config[adapter_name]
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"the adapter is {config.peft_type}, not LORA", key="peft_type")
    if init is not None:
        _check_start(config, init)
    return find_tuner(model)[1], config


def _check_start(config: LoraConfig, init: str) -> None:
    if config.init_lora_weights != init:
        raise AdapterError(f"must be {init!r}, not {config.init_lora_weights!r}", key="init_lora_weights")


@contextmanager
def _adapted(model: nn.Module, config: LoraConfig) -> Iterator[dict[str, LoraLayer]]:
    """Inside, the base model has the layers of a LoRA adapter."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inject(model, copy.deepcopy(config), _WHILE_LEARNING)
    try:
        yield lora_layers(model, _WHILE_LEARNING)
    finally:
        unload(model, _WHILE_LEARNING)
        for parameter in trained:
            parameter.requires_grad_(True)


def _targets(model: nn.Module, config: LoraConfig, init: str) -> tuple[dict[str, nn.Module], dict[str, Linear]]:
    """Return the linear layers that the config adapts, by name, and their sizes."""
    _check_start(config, init)
    modules = outer_modules(model)
    views = {name: view for name in targets(model, config) if (view := linear_view(modules[name])) is not None}
    return {name: modules[name] for name in views}, views


def _leave_at_layers(
    modules: Mapping[str, nn.Module],
    file: str | Path | None,
    shapes: Mapping[str, tuple[int, int]],
    learn: Callable[[], dict[str, torch.Tensor]],
) -> None:
    """Leave at the layers, where the adapter's take it, what ``file`` contains; without it, what ``learn`` returns."""
    if file is not None and Path(file).exists():
        found = read_tensor_file(Path(file))
        if {name: tuple(value.shape) for name, value in found.items()} != shapes:
            raise AdapterError("was made for other modules; delete it, or name another file", file=str(file))
    else:
        found = learn()
        if file is not None:
            write_tensor_file(Path(file), found)
    for name, value in found.items():
        base_module(modules[name]).__dict__[STATISTIC] = value
