"""The layers of LoRA (https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.inject import train_other_biases
from peftcli.core.layer import AdapterLayer, TrainedBias, adapter_dtype, bare
from peftcli.core.linear import Linear, linear_view
from peftcli.core.targets import pattern_value
from peftcli.errors import AdapterError
from peftcli.methods.lora.config import LoraConfig


class LoraLayer(AdapterLayer):
    """What LoRA's layers share: ``delta`` of the base weight, and how much of it counts."""

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


class LoraLinear(LoraLayer):
    """``y = W x + scaling * B A x`` with ``A: (r, in)``, ``B: (out, r)``; ``B`` starts at zero."""

    def __init__(self, base_layer: nn.Module, view: Linear, name: str, config: LoraConfig):
        super().__init__(base_layer, name, config)
        self.view = view
        like: dict[str, Any] = {
            "bias": False,
            "device": self.base_layer.weight.device,
            "dtype": adapter_dtype(self.base_layer.weight),
        }
        self.lora_A = nn.Linear(view.in_features, self.r, **like)
        self.lora_B = nn.Linear(self.r, view.out_features, **like)
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()  # no copy of x
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        if config.init_lora_weights:
            nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if not self.enabled:
            return y
        z = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        return y + (self.scaling * z).to(y.dtype)

    def delta(self) -> torch.Tensor:
        return self.view.as_stored(self.scaling * (self.lora_B.weight @ self.lora_A.weight))


class LoraEmbedding(LoraLayer):
    """``e(t) = W[t] + scaling * B A[:, t]`` with ``A: (r, V)``, ``B: (D, r)``; ``A`` starts at zero."""

    def __init__(self, base_layer: nn.Module, name: str, config: LoraConfig):
        super().__init__(base_layer, name, config)
        weight = self.base_layer.weight
        vocabulary, width = weight.shape
        like: dict[str, Any] = {"device": weight.device, "dtype": adapter_dtype(weight)}
        start = torch.zeros if config.init_lora_weights else torch.randn
        self.lora_embedding_A = nn.Parameter(start(self.r, vocabulary, **like))
        self.lora_embedding_B = nn.Parameter(torch.randn(width, self.r, **like))
        # some embeddings scale what they look up; the update is scaled alike, so that merging changes nothing
        self.output_scale = getattr(base_layer, "embed_scale", 1.0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(ids)
        if not self.enabled:
            return y
        z = F.embedding(ids, self.lora_embedding_A.T) @ self.lora_embedding_B.T
        return y + (self.scaling * self.output_scale * z).to(y.dtype)

    def delta(self) -> torch.Tensor:
        return self.scaling * (self.lora_embedding_B @ self.lora_embedding_A).T


def wrap(module: nn.Module, name: str, config: LoraConfig) -> LoraLayer:
    """The LoRA layer over ``module``.

    Raises:
        AdapterError: the module is of a kind that LoRA does not adapt.
    """
    view = linear_view(module)
    if view is None and not isinstance(bare(module), nn.Embedding):
        raise AdapterError(
            f"{name} is a {type(bare(module)).__name__}; LoRA adapts Linear, Conv1D and Embedding", key="target_modules"
        )
    if view is not None and config.r > 8 * min(view.in_features, view.out_features):
        raise AdapterError(f"{config.r} is far larger than {name}: {view.out_features} x {view.in_features}", key="r")
    trains_bias = config.bias in ("all", "lora_only") and getattr(module, "bias", None) is not None
    base = TrainedBias(module) if trains_bias else module
    return LoraEmbedding(base, name, config) if view is None else LoraLinear(base, view, name, config)


def attach(model: nn.Module, config: LoraConfig, layers: dict[str, AdapterLayer]) -> None:
    """Train the biases that ``bias: all`` names, and say in the config how weights are stored."""
    config.fan_in_fan_out = any(isinstance(layer, LoraLinear) and layer.view.transposed for layer in layers.values())
    if config.bias == "all":
        train_other_biases(model)
