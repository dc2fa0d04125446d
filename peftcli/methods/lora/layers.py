"""What LoRA does in a model: see ``peftcli.core.protocols``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from peftcli.core.layer import AdapterLayer, adapter_layers, base_module
from peftcli.core.linear import CONVOLUTIONS, linear_view
from peftcli.core.targets import named_parameters
from peftcli.errors import AdapterError
from peftcli.methods._delta import with_bias
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.attach import attach as attach
from peftcli.methods.lora.attach import read_names as read_names
from peftcli.methods.lora.attach import targets as targets
from peftcli.methods.lora.combine import combine as combine
from peftcli.methods.lora.initialisations import FROM_DATA, ON_EVERY_LAYER, is_residual
from peftcli.methods.lora.initialisations.loftq import LoftQLinear, start_loftq
from peftcli.methods.lora.initialisations.residual import calibrate as calibrate
from peftcli.methods.lora.initialisations.residual import check_initialisation, residual_kind
from peftcli.methods.lora.lora import LoraConv, LoraEmbedding, LoraLayer, LoraLinear, check_size, size_of
from peftcli.methods.lora.parameters import LoraAttention, LoraOutputProjection, check_attention, wrap_parameters
from peftcli.methods.lora.replicate import replicate, separate
from peftcli.methods.lora.updates import describe as describe
from peftcli.methods.lora.updates import updates as updates
from peftcli.methods.lora.variants import kasa, monteclora
from peftcli.methods.lora.variants.alora import ALoraLinear
from peftcli.methods.lora.variants.arrow import ArrowLayer
from peftcli.methods.lora.variants.bdlora import BdLoraLinear
from peftcli.methods.lora.variants.dora import add_magnitude
from peftcli.methods.lora.variants.qalora import QaLoraLinear
from peftcli.methods.lora.variants.velora import VeloraLinear

_KINDS: dict[type[nn.Module], type[LoraLayer]] = {
    nn.Embedding: LoraEmbedding,
    nn.MultiheadAttention: LoraAttention,
    **dict.fromkeys(CONVOLUTIONS, LoraConv),
}
"""Kind of module -> its layer; linear layers have more than one."""
_VARIANTS: dict[str, type[LoraLinear]] = {
    "alora_invocation_tokens": ALoraLinear,
    "use_bdlora": BdLoraLinear,
    "use_qalora": QaLoraLinear,
    "kasa_config": kasa.KasaLinear,
    "monteclora_config": monteclora.MontecloraLinear,
    "velora_config": VeloraLinear,
    "loftq_config": LoftQLinear,
}
"""The field that switches a variant on -> its linear layer."""
_PENALTIES = {"kasa_config": kasa.penalty, "monteclora_config": monteclora.penalty}
"""The same field -> what its layers add to the loss."""


def wrap(module: nn.Module, name: str, config: LoraConfig) -> AdapterLayer:
    """Return the LoRA layer over ``module``, whose name in the model is ``name``."""
    if config.arrow_config:
        return ArrowLayer(module, name, config)
    if config.init_lora_weights not in ON_EVERY_LAYER:
        check_initialisation(module, name, config)
    base, view, variant = base_module(module), linear_view(module), config.variant_key
    in_attention = isinstance(base, NonDynamicallyQuantizableLinear)  # the output's projection, which it never calls
    if variant and (view is None or in_attention):
        raise AdapterError(f"adapts linear layers; {name} is a {type(base).__name__}", key=variant)
    if named_parameters(module, name, config):
        return wrap_parameters(with_bias(module, config.bias), name, config)
    weight = getattr(base, "weight", None)
    r, _ = size_of(config, name)
    if view is not None:  # a quantised weight has another shape
        check_size(r, (view.out_features, view.in_features), name)
    elif weight is not None and weight.ndim > 1:
        check_size(r, weight.flatten(1).shape, name)
    if in_attention or isinstance(base, nn.MultiheadAttention):
        check_attention(name, config)
    below = with_bias(module, config.bias)
    layer: LoraLayer
    if view is not None and is_residual(config.init_lora_weights) and not variant:
        layer = residual_kind(below, config)(below, name, config)
    elif view is not None:
        linear = _VARIANTS[variant] if variant else LoraOutputProjection if in_attention else LoraLinear
        layer = linear(below, name, config.plain() if config.inference_mode else config)
        if config.init_lora_weights == "mica":
            layer.fix("lora_B.weight")
    elif kind := next((kind for each, kind in _KINDS.items() if isinstance(base, each)), None):
        layer = kind(below, name, config)
    else:
        raise AdapterError(
            f"{name} is a {type(base).__name__}; LoRA adapts Linear, Conv1D, Embedding, Conv1d, Conv2d, Conv3d and "
            "MultiheadAttention",
            key="target_modules",
        )
    if config.use_dora:
        add_magnitude(layer)
    return layer


def reshape(model: nn.Module, config: LoraConfig) -> None:
    """Build the deeper model of ``layer_replication``."""
    if config.layer_replication:
        replicate(model, config.layer_replication)


def after_merge(model: nn.Module, config: LoraConfig) -> None:
    """Give the layers of the deeper model weights of their own."""
    if config.layer_replication:
        separate(model)


def needs_batches(config: LoraConfig) -> bool:
    """Return whether A and B start from the training data."""
    return config.init_lora_weights in FROM_DATA


def needs_base_weights(config: LoraConfig) -> bool:
    """Return whether A and B start from the weights before quantisation."""
    return config.init_lora_weights == "loftq" and config.loftq_config is None


def start_from_base(model: nn.Module, config: LoraConfig, weight: Callable[[str], torch.Tensor]) -> None:
    """Start from what quantisation took away."""
    start_loftq(model, weight)


def penalty(model: nn.Module, config: LoraConfig) -> torch.Tensor | None:
    """Return what the enabled layers of the config's variant add to the loss."""
    compute = _PENALTIES.get(config.variant_key or "")
    return compute([layer for layer in adapter_layers(model).values() if layer.enabled]) if compute else None


def model_attributes(model: nn.Module, configs: Mapping[str, LoraConfig]) -> dict[str, Any]:
    """Return the methods of a model with LoRA, under PEFT's names: what to add to the loss."""

    def loss_of(
        compute: Callable[[Iterable[AdapterLayer]], torch.Tensor | None],
        adapter_names: str | Sequence[str] | None = None,
    ) -> torch.Tensor | float:
        """Return the penalty of these adapters, or of the active ones; 0.0 without a penalty."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        layers = adapter_layers(model).values()
        found = compute([each for each in layers if each.adapter in (each.active_adapters if names is None else names)])
        return 0.0 if found is None else found

    return {
        "_get_kasa_loss": partial(loss_of, kasa.penalty),
        "_get_monteclora_loss": partial(loss_of, monteclora.penalty),
    }
