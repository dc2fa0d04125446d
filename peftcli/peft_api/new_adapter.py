"""A new adapter: its name, its tokenizer, its place in the model."""

from __future__ import annotations

import dataclasses
import re
import warnings
from typing import Any

from torch import nn

from peftcli.adapters.load import adapter_folder
from peftcli.core.config import AdapterConfig, TargetedConfig
from peftcli.core.inject import inject, set_trainable
from peftcli.core.layer import TrainedBias, TrainedCopy, adapter_layers, base_name
from peftcli.core.protocols import NamesAdapters, needs_base_weights, needs_batches
from peftcli.core.quantised import is_quantised
from peftcli.core.weights import holds_its_file
from peftcli.errors import AdapterError, AdapterTypeError, PeftWarning
from peftcli.methods._token_rows import tied_group
from peftcli.models.open import open_base
from peftcli.peft_api.mixed_batch import BASE
from peftcli.peft_api.weights import cast_weights, empty_state
from peftcli.schema import BaseModel

_NAME = re.compile(r"[\w-]+( [\w-]+)*")


def check_name(name: str) -> None:
    """Raise AdapterError for a name that could not be a folder's, or that means something else."""
    if not _NAME.fullmatch(name) or name == BASE:
        raise AdapterError(
            f"{name!r} is not a valid name; use letters, digits, - and _, and single blanks between them",
            key="adapter_name",
        )


def check_config(config: Any) -> None:
    """Raise AdapterTypeError for what is no config of peftcli, such as one of PEFT's own."""
    if not isinstance(config, AdapterConfig):
        kind = f"{type(config).__module__}.{type(config).__name__}"
        hint = "make it with the class of that name in peftcli.peft_api" if kind.startswith("peft.") else None
        raise AdapterTypeError(f"expected a config of peftcli, found {kind}", key="peft_config", hint=hint)


def start_adapter(
    model: nn.Module,
    config: AdapterConfig,
    name: str,
    *,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
) -> None:
    """Put a new adapter into ``model``; see ``get_peft_model`` for the arguments.

    Raises:
        AdapterError: a setting or a start is missing that a recipe's training would find, or the config does not fit
            the model.
    """
    for key in config.found_by_training:
        if getattr(config, key) is None and not config.inference_mode:
            raise AdapterError("is needed: the number of optimizer steps of the whole training", key=key)
    if needs_base_weights(config) and not config.inference_mode and any(map(is_quantised, model.modules())):
        raise AdapterError(
            "loftq starts from the weights before quantisation, and the model holds the quantised ones only",
            key="init_lora_weights",
            hint="leave it out here, and call replace_lora_weights_loftq with the model that you get",
        )
    named, base = config.base_model_name_or_path, getattr(model, "name_or_path", None)
    if base and named != base:
        if named is not None:
            warnings.warn(
                f"base_model_name_or_path was renamed from {named!r} to {base!r}, as the model is called",
                PeftWarning,
                stacklevel=2,
            )
        config.base_model_name_or_path = base
    if isinstance(config, NamesAdapters):
        config.find_folder = adapter_folder
    config.prepare(lambda name, **options: open_base(BaseModel(name=name or _name_of(model))).processor(**options))
    inject(model, config, name)
    if isinstance(config, TargetedConfig) and not config.inference_mode:
        _warn_of_untied(model, config, name)
    if not autocast_adapter_dtype:
        cast_weights(model, name, as_base=True)
    if low_cpu_mem_usage and holds_its_file(model, name) and not needs_batches(config):
        empty_state(model, name)


def set_trainable_as_new(model: nn.Module, config: AdapterConfig, name: str) -> None:
    """Give a new adapter's weights gradients. ``inference_mode`` freezes them, of soft prompts only modules_to_save."""
    set_trainable(model, not config.inference_mode, name)
    if config.inference_mode and config.trains_in_inference_mode:
        for layer in adapter_layers(model, name).values():
            if not isinstance(layer, TrainedCopy):
                for parameter in layer.own_tensors().values():
                    parameter.requires_grad_(True)


def _warn_of_untied(model: nn.Module, config: AdapterConfig, adapter: str) -> None:
    """Warn if modules share a weight in the base model, and the adapter changes one of them or each in its own way."""
    trained: dict[str, set[nn.Parameter]] = {name: set() for name in tied_group(model)}
    for path, layer in adapter_layers(model, adapter).items():
        if (name := base_name(model, path)) in trained and not isinstance(layer, TrainedBias):
            trained[name].update(layer.own_tensors().values())
    changed = [name for name in trained if trained[name]]
    if not changed or set.intersection(*trained.values()):
        return
    settings = {entry.name for entry in dataclasses.fields(config) if not entry.metadata.get("unsupported")}
    reason = f"no implementation exists to tie the adapters of {config.peft_type}"
    if "ensure_weight_tying" in settings:
        reason = "`ensure_weight_tying` is not set to True"
    text = f"{' and '.join(trained)} share a weight, and the adapter of {' and '.join(changed)} changes it there only"
    if len(changed) == len(trained):
        text = f"{' and '.join(trained)} share a weight, and each gets an adapter of its own"
    warnings.warn(f"{text}: {reason}", PeftWarning, stacklevel=4)


def _name_of(model: nn.Module) -> str:
    name = getattr(model, "name_or_path", None)
    if not name:
        raise AdapterError("the model does not say which tokenizer is its own", key="tokenizer_name_or_path")
    return str(name)
