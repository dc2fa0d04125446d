"""PEFT's hot-swapping: another LoRA adapter in the place of one, without compiling the model again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.files import read_tensors
from peftcli.core.layer import adapter_layers
from peftcli.errors import AdapterError
from peftcli.methods.lora.config import LoraConfig
from peftcli.methods.lora.hotswap import check_same, swap, widen
from peftcli.methods.lora.lora import LoraLayer
from peftcli.peft_api.loading import find
from peftcli.peft_api.tuner import find_tuner


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: str | None = None,
    **options: Any,
) -> None:
    """Put the LoRA adapter of a folder or hub repository in the place of one of the model's, under its name.

    The adapter may have another r and lora_alpha, and fewer modules. In a compiled model its r must not be above that
    of the adapter that it replaces: ``prepare_model_for_compiled_hotswap``. The weights go where the old ones are,
    whatever ``torch_device`` is. The new update counts in full, whatever scale was set on the old one's layers.
    ``options`` are those of ``load_adapter``.

    Raises:
        AdapterError: the new adapter cannot be read or does not fit, or the old one is merged. Nothing is changed then.
    """
    tuner, place = find_tuner(model)
    if tuner is None:
        raise AdapterError(f"needs a PeftModel, not a {type(place).__name__}", hint="hotswap_adapter_from_state_dict")
    tuner.check_known([adapter_name])
    source = find(model_name_or_path, options)
    check_hotswap_configs_compatible(tuner.peft_config[adapter_name], source.config)
    hotswap_adapter_from_state_dict(model, read_tensors(source.folder), adapter_name, _lora(source.config))


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """The same with tensors, also in a plain model. Of the config, what says how strong the update is counts.

    The tensors have the names of the adapter file, or PEFT's: with the adapter's name before ``.weight``, and for plain
    models without ``base_model.model.``. There is no ``parameter_prefix`` but PEFT's.

    Raises:
        AdapterError: the tensors do not fit, or the old adapter is merged. Nothing is changed then.
    """
    tuner, place = find_tuner(model)
    configs = []
    if tuner is not None:
        if adapter_name in tuner.merged_adapters:
            raise AdapterError(f"{adapter_name} is merged; call unmerge_adapter() first", key="adapter_name")
        configs = [_lora(tuner.peft_config[adapter_name])]
    tensors = {_name_in_file(name, adapter_name): value for name, value in state_dict.items()}
    swap(place, adapter_name, config, tensors, *configs, may_widen=not _is_compiled(model))


def check_hotswap_configs_compatible(config0: AdapterConfig, config1: AdapterConfig) -> None:
    """Raise AdapterError if an adapter of one config cannot take the place of an adapter of the other."""
    check_same(_lora(config0), _lora(config1))


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, AdapterConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Give the LoRA adapters of a model the largest r of those that will take their place, before it is compiled.

    What the model computes stays. Without ``target_rank`` there is nothing to do.

    Args:
        model: a model with an adapter.
        target_rank: the r. None: what it is.
        config: configs that are changed to say the same: one, or by the names of the adapters. Those of a model of
            ``get_peft_model`` are changed in any case.
        check_compiled: what a model that is compiled already is: ``error``, ``warn``, or nothing (``ignore``).

    Raises:
        AdapterError: the model is compiled already, has no LoRA layer, or one of a larger r.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise AdapterError(f"must be error, warn or ignore, not {check_compiled!r}", key="check_compiled")
    if _is_compiled(model) and check_compiled != "ignore":
        if check_compiled == "error":
            raise AdapterError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        warnings.warn(
            "prepare_model_for_compiled_hotswap was called with a model that is already compiled, "
            "and will be compiled again",
            stacklevel=2,
        )
    tuner, place = find_tuner(model)
    known = tuner.peft_config if tuner else {}
    layers = [layer for layer in adapter_layers(place).values() if isinstance(layer, LoraLayer)]
    adapters = list(dict.fromkeys(layer.adapter for layer in layers))
    if not adapters:
        raise AdapterError("No adapter layers found on the model; load the first LoRA adapter before")
    if target_rank is None:
        return
    for name in adapters:
        given = config.get(name) if isinstance(config, Mapping) else config
        configs = {id(each): _lora(each) for each in (known.get(name), given) if each is not None}
        widen(place, name, target_rank, *configs.values())


def _is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def _lora(config: AdapterConfig) -> LoraConfig:
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"hot-swapping works for LORA, not {config.peft_type}", key="peft_type")
    return config


def _name_in_file(name: str, adapter: str) -> str:
    plain = name.removeprefix("_orig_mod.").removeprefix(LoraConfig.file_prefix)
    return LoraConfig.file_prefix + re.sub(rf"(lora_\w+)\.{re.escape(adapter)}(?=(\.weight|\.bias)?$)", r"\1", plain)
