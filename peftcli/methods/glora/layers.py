"""The layers of GLoRA (https://arxiv.org/abs/2306.07967)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import AdapterLayer, TrainedBias, adapter_layers, base_module, widened
from peftcli.core.linear import dense_weight
from peftcli.errors import AdapterError
from peftcli.methods._delta import draw_as_linear, factory_kwargs, require_linear, with_bias
from peftcli.methods.glora import GloraConfig


class Part(nn.Module):
    """One of A to E: a product ``Xd Xu``, or numbers ``X`` for its rows or for all of it. It starts at zero."""

    def __init__(self, what: str, shape: tuple[int, ...], config: GloraConfig, like: dict[str, Any]):
        super().__init__()
        self.what = what
        if what == "none":
            self.register_buffer("zeros", torch.zeros(shape, **like))  # it is nothing, but PEFT's readers ask for it
        elif what == "lora":
            self.Xd = nn.Parameter(torch.zeros(shape[0], config.r, **like))
            self.Xu = nn.Parameter(torch.empty(config.r, shape[1], **like))
            draw_as_linear(self.Xu)
        else:
            rows = (shape[0], *[1] * (len(shape) - 1))
            self.X = nn.Parameter(torch.zeros(rows if what == "vector" else 1, **like))
        if not config.init_weights and what != "none":
            nn.init.normal_(self.Xd if what == "lora" else self.X, std=0.02)

    def forward(self) -> torch.Tensor | float:
        """The part, in a shape that goes with the whole."""
        if self.what == "none":
            return 0.0
        return self.Xd @ self.Xu if self.what == "lora" else self.X


class GloraLinear(AdapterLayer):
    """``y = (W + W * A + B) x + b + b * D + E + W C``; C, D and E are nothing where there is no bias.

    All of it is made from the base model's own weight and bias, whatever other adapters do to the layer.
    """

    def __init__(self, module: nn.Module, name: str, config: GloraConfig):
        view = require_linear(module, name, "GLoRA")
        super().__init__(with_bias(module, config.bias))
        self.view = view
        rows, columns, like = view.out_features, view.in_features, factory_kwargs(self)
        of_c, of_d_e = (
            (config.config_C, config.config_D_E) if base_module(module).bias is not None else ("none", "none")
        )
        self.glora_A = Part(config.config_A_B, (rows, columns), config, like)
        self.glora_B = Part(config.config_A_B, (rows, columns), config, like)
        self.glora_C = Part(of_c, (columns, 1), config, like)
        self.glora_D = Part(of_d_e, (rows,), config, like)
        self.glora_E = Part(of_d_e, (rows,), config, like)
        parts = {name: part for name, part in self.named_children() if isinstance(part, Part)}
        self.fixed = tuple(f"{name}.zeros" for name, part in parts.items() if part.what == "none")

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weight = dense_weight(self)
        below = self.base_layer
        bias = below.own_tensors()["bias"] if isinstance(below, TrainedBias) else base_module(self).bias
        shift = None if bias is None else self._shift(weight, bias)
        return y + F.linear(x.to(weight.dtype), self._delta(weight), shift).to(y.dtype)

    def folded_over(self, base: dict[str, torch.Tensor], below: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = self.base_layer.own_tensors() if isinstance(self.base_layer, TrainedBias) else base
        stored = widened(base["weight"])
        weight = self.view.as_stored(stored)
        changed = {"weight": below.get("weight", stored) + self.view.as_stored(self._delta(weight))}
        if "bias" in base:
            changed["bias"] = below.get("bias", base["bias"]) + self._shift(weight, own["bias"])
        return changed

    def _delta(self, weight: torch.Tensor) -> torch.Tensor:
        return (weight * self.glora_A() + self.glora_B()).expand(weight.shape)

    def _shift(self, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        coupled = 0.0 if self.glora_C.what == "none" else (weight @ self.glora_C().to(weight)).squeeze(-1)
        return bias.to(weight.dtype) * self.glora_D() + self.glora_E() + coupled


wrap = GloraLinear


def attach(model: nn.Module, config: GloraConfig, layers: Mapping[str, AdapterLayer]) -> None:
    """Raise AdapterError for a new adapter with nothing to train, in these layers or beside them."""
    adapter = next(iter(layers.values())).adapter
    if not config.inference_mode and not any(each.own_tensors() for each in adapter_layers(model, adapter).values()):
        raise AdapterError(
            "none leaves nothing to train: C, D and E are for layers with a bias, and the adapted ones have no bias",
            key="config_A_B",
        )
