"""LoRA: Low-Rank Adaptation of Large Language Models (https://arxiv.org/abs/2106.09685), on every kind of layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import AdapterLayer, base_module, path_in_file, widened
from peftcli.core.linear import CONVOLUTIONS, dense_weight, linear_view
from peftcli.core.targets import pattern_value
from peftcli.errors import AdapterError
from peftcli.methods._delta import dropout_layer, factory_kwargs, layers_of_kind, lookup_scale
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.fused import Pair, fused_output, plain_pair
from peftcli.methods.lora.initialisations.start import initialise
from peftcli.methods.lora.joined import joined_linear, share_of
from peftcli.methods.lora.variants import dora

_USUAL_R = 64  # the largest r that fits a layer of any size


class LoraLayer(AdapterLayer):
    """``y = W x + scaling * B A x`` with ``A: (r, in)`` and ``B: (out, r)``; W stays, and B starts at zero."""

    larger_rate = ("lora_B.weight", "lora_B.bias", "out.lora_B.weight")
    embedding_rate = ("lora_embedding_A", "lora_embedding_B")
    lora_A: Any
    lora_B: Any
    lora_magnitude_vector: nn.Parameter | None
    full_scaling: float

    def __init__(self, base_layer: nn.Module, name: str, config: LoraConfig):
        super().__init__(base_layer)
        self.r, self.full_scaling = size_of(config, name)
        self.scaling = self.full_scaling
        self.lora_dropout = dropout_layer(config.lora_dropout)
        self.lora_magnitude_vector = None  # DoRA's

    def start(self, config: LoraConfig) -> None:
        """Give A and B their first values."""
        a, b, init = self.lora_A.weight, self.lora_B.weight, config.init_lora_weights
        initialise(a, b, init, self.scaling, lambda: dense_weight(self.base_layer))
        if self.lora_B.bias is not None and init:
            nn.init.zeros_(self.lora_B.bias)

    def fix(self, tensor: str) -> None:
        """Keep A or B as it starts."""
        self.fixed = (tensor,)
        self.get_parameter(tensor).requires_grad_(False)

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.lora_dropout(x.to(self.lora_A.weight.dtype) if self.casts_input else x)
        z = self.update(x) if self.lora_magnitude_vector is None else dora.update(self, x, y)
        return y + z.to(y.dtype)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """Return what LoRA adds to the output for the input ``x``, which has the adapter's dtype."""
        return self.scaling * self.lora_B(self.lora_A(x))

    def delta(self) -> torch.Tensor:
        """Return what LoRA adds to the base weight, in the base weight's shape."""
        raise NotImplementedError

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        merged = {"weight": widened(base["weight"]) + self.delta()}
        bias = self.own_tensors().get("lora_B.bias")
        if bias is None:
            return merged
        if "bias" not in base:
            raise AdapterError("cannot be merged: a base layer has no bias to add lora_B's to", key="lora_bias")
        return merged | {"bias": base["bias"] + self.scaling * bias}

    def folded_over(self, base: dict[str, torch.Tensor], below: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        plain = self.lora_magnitude_vector is None
        return super().folded_over(base, below) if plain else dora.folded_over(self, base, below)


class LoraLinear(LoraLayer):
    """A linear layer, or GPT-2's Conv1D, whose weight is stored (in, out)."""

    def __init__(self, base_layer: nn.Module, name: str, config: LoraConfig):
        super().__init__(base_layer, name, config)
        view = linear_view(base_layer)
        assert view is not None
        self.view = view
        self.make_pair(name, config)
        self.start(config)

    def make_pair(self, name: str, config: LoraConfig) -> None:
        """Make A and B, not filled yet."""
        like = factory_kwargs(self.base_layer)
        self.lora_A = nn.Linear(self.view.in_features, self.r, bias=False, **like)
        self.lora_B = nn.Linear(self.r, self.view.out_features, bias=config.lora_bias, **like)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        pair = self.fused_pair() if self.enabled else None
        return super().forward(x, *args, **kwargs) if pair is None else fused_output(self, pair, x, *args, **kwargs)

    def fused_pair(self) -> Pair | None:
        """Return A and B if ``fused_output`` computes what this layer does, and in less time."""
        plain = type(self).update is LoraLayer.update and self.lora_magnitude_vector is None
        return plain_pair(self) if plain and self.casts_input else None

    def join_layers(self, x: torch.Tensor, layers: Sequence[tuple[AdapterLayer | None, int]]) -> torch.Tensor | None:
        shares = [share_of(layer, size) for layer, size in layers if layer is None or isinstance(layer, LoraLinear)]
        known = [share for share in shares if share is not None]
        return joined_linear(x, self.base_layer, known) if len(known) == len(layers) else None

    def delta(self) -> torch.Tensor:
        return self.view.as_stored(self.scaling * (self.lora_B.weight @ self.lora_A.weight))


class LoraConv(LoraLayer):
    """A convolution with ``A: (r, in, k, ...)``, which moves as the base layer's, and ``B: (out, r/groups, 1, ...)``.

    A reads all input channels, also where the base layer has groups.
    """

    def __init__(self, base_layer: nn.Module, name: str, config: LoraConfig):
        super().__init__(base_layer, name, config)
        conv, like = base_module(base_layer), factory_kwargs(base_layer)
        if config.use_dora and conv.groups > 1:
            raise AdapterError(f"is not supported for {name}, a convolution with groups", key="use_dora")
        if self.r % conv.groups:
            raise AdapterError(f"{self.r} is not a multiple of {name}'s {conv.groups} groups", key="r")
        kind = next(kind for kind in CONVOLUTIONS if isinstance(conv, kind))
        moves = {key: getattr(conv, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        self.lora_A = kind(conv.in_channels, self.r, bias=False, **moves, **like)
        self.lora_B = kind(self.r, conv.out_channels, 1, groups=conv.groups, bias=config.lora_bias, **like)
        self.start(config)

    def delta(self) -> torch.Tensor:
        a, b, conv = self.lora_A.weight, self.lora_B.weight, base_module(self)
        groups, shape = conv.groups, conv.weight.shape
        if groups == 1:
            return (self.scaling * (b.flatten(1) @ a.flatten(1))).view(shape)
        # B A is a kernel (out, in, k, ...) over all channels; the base kernel holds one block of it per group
        whole = self.scaling * (torch.block_diag(*b.flatten(1).chunk(groups)) @ a.flatten(1))
        blocks = whole.view(groups, shape[0] // groups, groups, -1)
        own = torch.stack([blocks[group, :, group] for group in range(groups)])
        if own.count_nonzero() != whole.count_nonzero():
            raise AdapterError(
                f"a convolution with {groups} groups cannot be merged: its update lets a group read the channels of "
                "other groups, and its kernel has no place for such weights",
                key="target_modules",
                hint="use the adapter unmerged, or train one without this layer",
            )
        return own.view(shape)


class LoraEmbedding(LoraLayer):
    """``e(t) = W[t] + scaling * B A[:, t]`` with ``A: (r, V)`` and ``B: (D, r)``; A starts at zero.

    The column of the base layer's ``padding_idx`` gets no gradient, as its row would get none.
    """

    def __init__(self, base_layer: nn.Module, name: str, config: LoraConfig):
        super().__init__(base_layer, name, config)
        if config.lora_bias:
            raise AdapterError(f"is not supported for {name}, an Embedding", key="lora_bias")
        (vocabulary, width), like = self.base_layer.weight.shape, factory_kwargs(base_layer)
        first = torch.zeros if config.init_lora_weights else torch.randn
        self.lora_embedding_A = nn.Parameter(first(self.r, vocabulary, **like))
        self.lora_embedding_B = nn.Parameter(torch.randn(width, self.r, **like))
        if config.init_lora_weights == "mica":
            if not config.inference_mode:
                weight = widened(self.base_layer.weight.detach()).T
                initialise(self.lora_embedding_A, self.lora_embedding_B, "mica", self.scaling, lambda: weight)
            self.fix("lora_embedding_B")

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        chosen = F.embedding(x, self.lora_embedding_A.T, padding_idx=base_module(self).padding_idx)
        z = self.scaling * lookup_scale(self) * (chosen @ self.lora_embedding_B.T)
        if self.lora_magnitude_vector is not None:
            return (dora.factor(self) * (y + z)).to(y.dtype)
        return y + z.to(y.dtype)

    def delta(self) -> torch.Tensor:
        return self.scaling * (self.lora_embedding_B @ self.lora_embedding_A).T


def lora_layers(model: nn.Module, adapter: str | None = None) -> dict[str, LoraLayer]:
    """Return the LoRA layers of the model's adapter, or of several the one of that name, by what they adapt."""
    found = layers_of_kind(model, LoraLayer, adapter)
    if len({layer.adapter for layer in found.values()}) > 1:
        raise AdapterError("the model holds several adapters; name one", key="init_lora_weights")
    return {path_in_file(model, path): layer for path, layer in found.items()}


def size_of(config: LoraConfig, name: str) -> tuple[int, float]:
    """Return the r that the config gives the layer of the module ``name``, and the factor of its update."""
    r = int(pattern_value(config.rank_pattern, name, config.r))
    alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    return r, alpha / (math.sqrt(r) if config.use_rslora else r)


def check_size(r: int, shape: Sequence[int], name: str) -> None:
    """Raise AdapterError for an r far beyond what a weight of this shape, (out, in), has room for."""
    if r > max(_USUAL_R, 8 * max(shape)):
        raise AdapterError(f"{r} is far larger than {name}: {shape[0]} x {shape[1]}", key="r")
