"""PEFT's functions: put a new adapter into a model, and read and write an adapter's tensors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.layer import adapter_layers
from peftcli.core.weights import adapter_state, load_state
from peftcli.errors import PeftWarning
from peftcli.peft_api.config import PeftConfig
from peftcli.peft_api.model import PeftModel, class_of


def get_peft_model(model: nn.Module, peft_config: AdapterConfig, adapter_name: str = "default") -> PeftModel:
    """Put a new adapter into ``model``, in place, and wrap it.

    Raises:
        AdapterError: the config does not fit the model.
    """
    if adapter_layers(model):
        told = "the model has an adapter already, and keeps it beside the new one; unload() takes it out"
        warnings.warn(told, PeftWarning, stacklevel=2)
    return class_of(peft_config)(model, peft_config, adapter_name)


def get_peft_config(config_dict: Mapping[str, Any]) -> AdapterConfig:
    """Make a config as ``PeftConfig.from_peft_type`` does."""
    return PeftConfig.from_peft_type(**config_dict)


def get_peft_model_state_dict(model: nn.Module, *, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
    """An adapter's tensors by the names of the adapter file; without a name, the active adapter's.

    Raises:
        AdapterError: there is no such adapter, or without a name there are several.
    """
    return adapter_state(*_place(model, adapter_name))


def set_peft_model_state_dict(
    model: nn.Module, peft_model_state_dict: Mapping[str, torch.Tensor], adapter_name: str | None = None
) -> None:
    """Copy an adapter's tensors, by the names of the adapter file, into the model; without a name, the active one's.

    Raises:
        AdapterError: there is no such adapter, or the tensors are not those that it has. Nothing is changed then.
    """
    place, name = _place(model, adapter_name)
    load_state(place, peft_model_state_dict, adapter=name)


def _place(model: nn.Module, name: str | None) -> tuple[nn.Module, str | None]:
    """The model that holds the adapter layers, and the adapter's name."""
    if not isinstance(model, PeftModel):
        return model, name
    chosen = model.base_model.only_active() if name is None else name
    model.base_model.check_known([chosen])
    return model.get_base_model(), chosen
