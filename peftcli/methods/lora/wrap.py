"""What LoRA does in a model: see ``peftcli.core.protocols``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from peftcli.core.layer import bare
from peftcli.core.linear import linear_view
from peftcli.core.targets import pattern_value
from peftcli.errors import AdapterError
from peftcli.methods._linear import with_bias
from peftcli.methods.lora.attach import attach as attach
from peftcli.methods.lora.calibrate import calibrate as calibrate
from peftcli.methods.lora.calibrate import start_loftq
from peftcli.methods.lora.config import LoraConfig
from peftcli.methods.lora.conv import KINDS, LoraConv
from peftcli.methods.lora.dora import DORA
from peftcli.methods.lora.init_config import FROM_DATA
from peftcli.methods.lora.layers import LoraEmbedding, LoraLayer, LoraLinear, check_size
from peftcli.methods.lora.names import targets as targets
from peftcli.methods.lora.parameters import (
    LoraAttention,
    LoraOutputProjection,
    check_attention,
    named_parameters,
    wrap_parameters,
)
from peftcli.methods.lora.replicate import replicate, separate
from peftcli.methods.lora.residual_init import check_kind, linear_kind
from peftcli.methods.lora.updates import updates as updates


def wrap(module: nn.Module, name: str, config: LoraConfig) -> LoraLayer:
    """The LoRA layer over ``module``.

    Raises:
        AdapterError: the module is of a kind that LoRA does not adapt, or not with these settings.
    """
    check_kind(module, name, config)
    if named_parameters(module, name, config):
        return wrap_parameters(module, name, config)
    layer, view = bare(module), linear_view(module)
    if (shape := _matrix_shape(layer)) is not None:
        check_size(int(pattern_value(config.rank_pattern, name, config.r)), shape, name)
    if isinstance(layer, nn.MultiheadAttention):
        check_attention(name, config)
        return LoraAttention(module, name, config)
    base = with_bias(module, config.bias)
    if view is not None:
        over: Any
        over, config = linear_kind(base, config)
        if isinstance(layer, NonDynamicallyQuantizableLinear) and over is LoraLinear:
            check_attention(name, config)
            over = LoraOutputProjection
        return (DORA[over] if config.use_dora else over)(base, view, name, config)
    kinds: list[tuple[Any, type[LoraLayer]]] = [(nn.Embedding, LoraEmbedding), (KINDS, LoraConv)]
    kind = next((kind for of, kind in kinds if isinstance(layer, of)), None)
    if kind is None:
        raise AdapterError(
            f"{name} is a {type(layer).__name__}; LoRA adapts Linear, Conv1D, Embedding, Conv1d, Conv2d, Conv3d and "
            "MultiheadAttention",
            key="target_modules",
        )
    if kind is LoraEmbedding and config.lora_bias:
        raise AdapterError(f"is not supported for {name}, an Embedding", key="lora_bias")
    return (DORA[kind] if config.use_dora else kind)(base, name, config)


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
    return config.init_lora_weights == "loftq"


def start_from_base(model: nn.Module, config: LoraConfig, weight: Callable[[str], torch.Tensor]) -> None:
    """Start from what quantisation took away."""
    start_loftq(model, weight)


def _matrix_shape(layer: Any) -> tuple[int, ...] | None:
    """The shape of the matrix that A and B add to; None for an embedding, and for what has no such matrix."""
    if (view := linear_view(layer)) is not None:  # a quantised weight has another shape
        return view.out_features, view.in_features
    weight = getattr(layer, "weight", None)
    if weight is None or weight.ndim < 2 or isinstance(layer, nn.Embedding):
        return None
    return tuple(weight.flatten(1).shape)
