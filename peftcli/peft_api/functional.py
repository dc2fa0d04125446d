"""PEFT's functions for adapters in a plain model, one without a PeftModel around it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from peftcli.core.config import TARGETING, AdapterConfig
from peftcli.core.inject import set_active, set_trainable
from peftcli.core.layer import adapter_layers, base_modules
from peftcli.core.prompts.config import SoftPromptConfig
from peftcli.core.targets import find_modules, module_matches, targets
from peftcli.errors import AdapterError
from peftcli.peft_api.adding import check_config, start_adapter
from peftcli.peft_api.layers import cast_weights
from peftcli.peft_api.state_dicts import get_peft_model_state_dict, set_peft_model_state_dict
from peftcli.peft_api.tuner import Tuner, check_name, known_names_in, set_adapter, set_requires_grad

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]


def inject_adapter_in_model(
    peft_config: AdapterConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Iterable[str] | None = None,
) -> nn.Module:
    """Put a new adapter into ``model``, in place, and return the model. The new adapter is the active one.

    Args:
        peft_config: the adapter's.
        model: the model, maybe with other adapters in it.
        adapter_name: the adapter's name in the model.
        low_cpu_mem_usage: leave the adapter's tensors on the meta device; ``set_peft_model_state_dict`` fills them.
        state_dict: tensors of an adapter, by the names that ``get_peft_model_state_dict`` gives them. The modules that
            they belong to are adapted, whatever ``target_modules`` says; their values are not read.

    Raises:
        AdapterError: the config does not fit the model, or is that of a soft prompt: use ``get_peft_model``.
    """
    check_config(peft_config)
    if isinstance(peft_config, SoftPromptConfig):
        raise AdapterError(f"{peft_config.peft_type} puts no layers into a model; use get_peft_model", key="peft_type")
    check_name(adapter_name)
    if state_dict is not None:
        peft_config = _with_targets_of(model, peft_config, state_dict)
    start_adapter(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    configs: Any = getattr(model, "peft_config", {})
    model.peft_config = configs | {adapter_name: peft_config}  # libraries that use PEFT read it
    set_active(model, [adapter_name])
    set_trainable(model, not peft_config.inference_mode, adapter_name)
    return model


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str | None = None) -> list[str]:
    """Remove an adapter and return the active ones. If it was the only active one, the first of those left is that.

    That one then trains, with a warning. PEFT's ``prefix`` is not needed.

    Raises:
        AdapterError: an unknown name.
    """
    known_names_in(model, adapter_name)
    layers = adapter_layers(model).values()
    tuner = Tuner(model, dict.fromkeys(layer.adapter for layer in layers))
    tuner.active_adapters = list(dict.fromkeys(layer.adapter for layer in layers if layer.enabled))
    tuner.delete_adapter(adapter_name)
    getattr(model, "peft_config", {}).pop(adapter_name, None)
    return tuner.active_adapters


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Hold an adapter's weights in float32 where they are in a smaller dtype, unless ``autocast_adapter_dtype`` is off.

    New and loaded adapters are in float32 already.
    """
    known_names_in(model, adapter_name)
    if autocast_adapter_dtype:
        cast_weights(model, adapter_name)


def _with_targets_of(model: nn.Module, config: AdapterConfig, names: Iterable[str]) -> AdapterConfig:
    """Return a copy of the config that adapts the modules that the tensors of these names belong to.

    Warns where the config says otherwise.
    """
    if getattr(config, "target_parameters", None):
        raise AdapterError("cannot be found from a state_dict; leave one of them out", key="target_parameters")
    modules = base_modules(model)
    saved = tuple(f"{name}." for name in find_modules(model, config.modules_to_save or (), "modules_to_save"))
    plain = [name.removeprefix(config.file_prefix).removeprefix("_orig_mod.") for name in names]
    owners = set()
    for parts in (name.split(".") for name in plain if not name.endswith(".bias") and ".token_adapter." not in name):
        paths = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        owners.add(next((path for path in paths if path in modules), ""))  # the innermost module
    found = sorted(owner for owner in owners if owner and not f"{owner}.".startswith(saved))
    if not found:
        raise AdapterError(f"holds no tensor of a module of {type(model).__name__}", key="state_dict")
    completed = copy.deepcopy(config)
    named = targets(model, completed)
    for others, what in ((set(named).difference(found), "config"), (set(found).difference(named), "state_dict")):
        if others:
            warnings.warn(f"only the {what} adapts {', '.join(sorted(others))}", RuntimeWarning, stacklevel=3)
    narrowed = copy.deepcopy(config)
    if (inner := getattr(completed, "feedforward_modules", None)) is not None:  # (IA)^3's, some of the targets
        narrowed.feedforward_modules = [name for name in found if any(module_matches(name, each) for each in inner)]  # type: ignore[attr-defined]
    for key in TARGETING:
        if hasattr(narrowed, key):
            setattr(narrowed, key, found if key == "target_modules" else None)
    return narrowed
