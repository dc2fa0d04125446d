"""What LoRA does in a model: see ``peftcli.core.protocols``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from peftcli.core.layer import AdapterLayer, base_module
from peftcli.core.linear import linear_view
from peftcli.core.targets import CONVOLUTIONS, named_parameters
from peftcli.errors import AdapterError
from peftcli.methods._linear import with_bias
from peftcli.methods.lora.arrow import ArrowLayer
from peftcli.methods.lora.attach import attach as attach
from peftcli.methods.lora.combine import combine as combine
from peftcli.methods.lora.config import LoraConfig
from peftcli.methods.lora.dora import add_magnitude
from peftcli.methods.lora.initialisations.config import FROM_DATA
from peftcli.methods.lora.initialisations.from_data import calibrate as calibrate
from peftcli.methods.lora.initialisations.loftq import start_loftq
from peftcli.methods.lora.initialisations.residual import check_initialisation, linear_layer
from peftcli.methods.lora.lora import LoraConv, LoraEmbedding, LoraLayer, check_size, size_of
from peftcli.methods.lora.parameters import (
    LoraAttention,
    LoraOutputProjection,
    check_attention,
    wrap_parameters,
)
from peftcli.methods.lora.replicate import replicate, separate
from peftcli.methods.lora.targets import read_names as read_names
from peftcli.methods.lora.targets import targets as targets
from peftcli.methods.lora.updates import describe as describe
from peftcli.methods.lora.updates import updates as updates
from peftcli.methods.lora.variant_settings import variant_of
from peftcli.methods.lora.variants import LAYERS as VARIANT_LAYERS
from peftcli.methods.lora.variants import model_attributes as model_attributes
from peftcli.methods.lora.variants import penalty as penalty


def wrap(module: nn.Module, name: str, config: LoraConfig) -> AdapterLayer:
    """Return the LoRA layer over ``module``, whose name in the model is ``name``."""
    if config.arrow_config:
        return ArrowLayer(module, name, config)
    check_initialisation(module, name, config)
    base, view, variant = base_module(module), linear_view(module), variant_of(config)
    projects = isinstance(base, NonDynamicallyQuantizableLinear)  # an attention's output
    if variant and (view is None or projects):
        raise AdapterError(f"adapts linear layers; {name} is a {type(base).__name__}", key=variant)
    if named_parameters(module, name, config):
        return wrap_parameters(with_bias(module, config.bias), name, config)
    weight = getattr(base, "weight", None)
    r, _ = size_of(config, name)
    if view is not None:  # a quantised weight has another shape
        check_size(r, (view.out_features, view.in_features), name)
    elif weight is not None and weight.ndim > 1:
        check_size(r, weight.flatten(1).shape, name)
    if projects or isinstance(base, nn.MultiheadAttention):
        check_attention(name, config)
    if isinstance(base, nn.MultiheadAttention):
        return LoraAttention(module, name, config)
    below = with_bias(module, config.bias)
    layer: LoraLayer
    if projects or variant:
        kind = VARIANT_LAYERS[variant] if variant else LoraOutputProjection
        layer = kind(below, name, config.plain() if config.inference_mode else config)
    elif view is not None:
        layer = linear_layer(below, name, config)
    elif isinstance(base, CONVOLUTIONS):
        layer = LoraConv(below, name, config)
    elif isinstance(base, nn.Embedding):
        if config.lora_bias:
            raise AdapterError(f"is not supported for {name}, an Embedding", key="lora_bias")
        layer = LoraEmbedding(below, name, config)
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
