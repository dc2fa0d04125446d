"""PEFT's functions: prepare a model, put a new adapter into it, and read and write an adapter's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.quantised import is_quantised
from peftcli.core.weights import adapter_state, load_state
from peftcli.peft_api.config import PeftConfig
from peftcli.peft_api.model import PeftModel, class_of

_HALVES = ("gptq", "aqlm", "eetq", "hqq", "torchao")
"""Of transformers' quantisation methods those whose layers want inputs in half precision."""


def get_peft_model(model: nn.Module, peft_config: AdapterConfig, adapter_name: str = "default") -> PeftModel:
    """Put a new adapter into ``model``, in place, and wrap it.

    Raises:
        AdapterError: the config does not fit the model.
    """
    return class_of(peft_config)(model, peft_config, adapter_name)


def get_peft_config(config_dict: Mapping[str, Any]) -> AdapterConfig:
    """Make a config as ``PeftConfig.from_peft_type`` does."""
    return PeftConfig.from_peft_type(**config_dict)


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Freeze a model, and hold what is not quantised of it in float32.

    Args:
        model: a model of transformers, quantised by bitsandbytes or not.
        use_gradient_checkpointing: compute the activations of a quantised model again in the backward pass.
        gradient_checkpointing_kwargs: of ``torch.utils.checkpoint``; ``use_reentrant`` is False where not given.
    """
    quantised = [module for module in model.modules() if is_quantised(module)]
    kept = {id(value) for module in quantised for value in module.parameters(recurse=False)}
    model.requires_grad_(False)
    if getattr(model, "quantization_method", None) not in _HALVES:
        for value in model.parameters():
            if value.dtype in (torch.float16, torch.bfloat16) and id(value) not in kept:
                value.data = value.data.float()
    if quantised and use_gradient_checkpointing:
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            prepare_model_for_gradient_checkpointing(model)
        # under the name of transformers 5.24 and later, or the one before
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(options)
    return model


def prepare_model_for_gradient_checkpointing(model: Any) -> Any:
    """Make the input embeddings' outputs require gradients, so that checkpointed blocks over frozen ones pass them."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    else:
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return model


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
