"""PEFT's functions: put a new adapter into a model, and read and write an adapter's tensors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.layer import adapter_layers
from peftcli.errors import PeftWarning
from peftcli.peft_api.config import PeftConfig
from peftcli.peft_api.mixed_model import PeftMixedModel
from peftcli.peft_api.model import PeftModel
from peftcli.peft_api.new_adapter import check_config


def get_peft_model(
    model: nn.Module,
    peft_config: AdapterConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put a new adapter into ``model``, in place, and wrap it.

    Args:
        model: the base model.
        peft_config: the adapter's config. It is completed by what is found in the model.
        adapter_name: the adapter's name in the model.
        mixed: PEFT's; every model takes adapters of several methods here. True: the class is ``PeftMixedModel``.
        autocast_adapter_dtype: whether the adapter's weights are float32 over a base model in half precision, or in the
            base model's dtype.
        revision: the base model's revision, to be written into the config.
        low_cpu_mem_usage: whether the adapter's weights stay on the meta device until they are loaded. Those that start
            from the base model or from training data do not.

    Raises:
        AdapterError: the config does not fit the model.
    """
    check_config(peft_config)
    if any(layer.adapter != adapter_name for layer in adapter_layers(model).values()):
        text = (
            "You are trying to modify a model that has an adapter already. It stays, switched off; unload() removes it"
        )
        warnings.warn(text, PeftWarning, stacklevel=2)
    if revision is not None:
        if peft_config.revision not in (None, revision):
            text = f"revision: {peft_config.revision} in the config becomes {revision}"
            warnings.warn(text, PeftWarning, stacklevel=2)
        peft_config.revision = revision
    kind: type[PeftModel] = PeftMixedModel if mixed else PeftModel
    return kind.class_of(peft_config)(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def get_peft_config(config_dict: Mapping[str, Any]) -> AdapterConfig:
    """Make a config as ``PeftConfig.from_peft_type`` does."""
    return PeftConfig.from_peft_type(**config_dict)
