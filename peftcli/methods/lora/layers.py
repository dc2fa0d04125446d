"""The layers of LoRA (https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import AdapterLayer, adapter_dtype
from peftcli.core.linear import Linear, dense_weight
from peftcli.core.targets import pattern_value
from peftcli.errors import AdapterError
from peftcli.methods._linear import beside, dropout_layer
from peftcli.methods.lora.config import LoraConfig
from peftcli.methods.lora.init import start


class LoraLayer(AdapterLayer):
    """What LoRA's layers share: ``delta`` of the base weight, and how much of it counts."""

    larger_rate = ("lora_B.weight", "lora_B.bias", "out.lora_B.weight")
    embedding_rate = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, base_layer: nn.Module, name: str, config: LoraConfig):
        super().__init__(base_layer)
        self.r = int(pattern_value(config.rank_pattern, name, config.r))
        alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
        self.scaling = alpha / (math.sqrt(self.r) if config.use_rslora else self.r)

    def delta(self) -> torch.Tensor:
        """What the adapter adds to the base weight, in the base weight's shape."""
        raise NotImplementedError

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"weight": base["weight"].to(adapter_dtype(base["weight"])) + self.delta()}


class LoraPair(LoraLayer):
    """``y = W x + scaling * B A x``, with A and B layers of the base layer's kind; ``B`` starts at zero."""

    lora_A: Any
    lora_B: Any

    def place(self, a: nn.Module, b: nn.Module, config: LoraConfig) -> None:
        """Take A and B, of which B may have a bias, and give them their first values."""
        self.lora_A, self.lora_B = a, b
        self.dropout = dropout_layer(config.lora_dropout)
        init, weights = config.init_lora_weights, (self.lora_A.weight, self.lora_B.weight)
        start(*weights, init, self.scaling, lambda: dense_weight(self.base_layer))
        if self.lora_B.bias is not None and init:
            nn.init.zeros_(self.lora_B.bias)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if not self.enabled:
            return y
        return y + self.update(self.dropout(x.to(self.lora_A.weight.dtype))).to(y.dtype)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to the output for the input ``x``, which has the adapter's dtype."""
        return self.scaling * self.lora_B(self.lora_A(x))

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        merged, bias = super().merged_tensors(base), self.lora_B.bias
        if bias is None:
            return merged
        if "bias" not in base:
            raise AdapterError("cannot be merged: a base layer has no bias to add lora_B's to", key="lora_bias")
        return merged | {"bias": base["bias"] + self.scaling * bias}


class LoraLinear(LoraPair):
    """A linear layer with ``A: (r, in)`` and ``B: (out, r)``."""

    def __init__(self, base_layer: nn.Module, view: Linear, name: str, config: LoraConfig):
        super().__init__(base_layer, name, config)
        self.view = view
        like = beside(base_layer)
        down = nn.Linear(view.in_features, self.r, bias=False, **like)
        self.place(down, nn.Linear(self.r, view.out_features, bias=config.lora_bias, **like), config)

    def delta(self) -> torch.Tensor:
        return self.view.as_stored(self.scaling * (self.lora_B.weight @ self.lora_A.weight))


class LoraEmbedding(LoraLayer):
    """``e(t) = W[t] + scaling * B A[:, t]`` with ``A: (r, V)``, ``B: (D, r)``; ``A`` starts at zero."""

    def __init__(self, base_layer: nn.Module, name: str, config: LoraConfig):
        super().__init__(base_layer, name, config)
        weight = self.base_layer.weight
        vocabulary, width = weight.shape
        check_size(self.r, weight.shape, name)
        like = beside(base_layer)
        first = torch.zeros if config.init_lora_weights else torch.randn
        self.lora_embedding_A = nn.Parameter(first(self.r, vocabulary, **like))
        self.lora_embedding_B = nn.Parameter(torch.randn(width, self.r, **like))
        # some embeddings scale what they look up; the update is scaled alike, so that merging changes nothing
        self.output_scale = getattr(base_layer, "embed_scale", 1.0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(ids)
        return y + self.update(ids).to(y.dtype) if self.enabled else y

    def update(self, ids: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to the output."""
        z = F.embedding(ids, self.lora_embedding_A.T) @ self.lora_embedding_B.T
        return self.scaling * self.output_scale * z

    def delta(self) -> torch.Tensor:
        return self.scaling * (self.lora_embedding_B @ self.lora_embedding_A).T


def check_size(r: int, shape: Sequence[int], name: str) -> None:
    """Raises AdapterError for an r far beyond what a weight of this shape, (out, in), has room for."""
    if r > 8 * min(shape):
        raise AdapterError(f"{r} is far larger than {name}: {shape[0]} x {shape[1]}", key="r")
