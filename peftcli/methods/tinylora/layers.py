"""The layers of TinyLoRA (https://arxiv.org/abs/2602.04118), and the numbers that they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import AdapterLayer, base_module, widened
from peftcli.core.linear import dense_weight
from peftcli.methods._delta import DeltaLinear, by_kind, dropout_layer, factory_kwargs, lookup_scale, stored_weight
from peftcli.methods.tinylora import TinyLoraConfig


class TinyLoraLayer(AdapterLayer):
    """``delta = B R A`` with ``R: (r, r)`` the sum of random matrices ``P: (u, r, r)``, each times a trained number.

    ``B A`` is the weight's best approximation of rank r. ``tinylora_v: (u,)`` belongs to a group of layers.
    """

    fixed = ("tinylora_A", "tinylora_B", "tinylora_P")
    tinylora_v: nn.Parameter
    tinylora_A: torch.Tensor
    tinylora_B: torch.Tensor
    tinylora_P: torch.Tensor
    group: int
    saves_projection: bool

    def decompose(self, weight: torch.Tensor, config: TinyLoraConfig) -> None:
        """Take ``A`` and ``B`` from the weight."""
        r = min(config.r, *weight.shape)
        if config.inference_mode:  # a file has them, and finding them takes long
            a, b = weight.new_zeros(r, weight.shape[1]), weight.new_zeros(weight.shape[0], r)
        else:
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)
            root = s[:r].sqrt()
            a, b = root.unsqueeze(1) * vt[:r], u[:, :r] * root
        # contiguous, as when they come from a file, so that they are rounded alike
        self.tinylora_A = nn.Parameter(a.contiguous(), requires_grad=False)
        self.tinylora_B = nn.Parameter(b.contiguous(), requires_grad=False)

    def join(self, group: int, v: nn.Parameter, number: int, config: TinyLoraConfig) -> None:
        """Take the trained numbers of a group, and draw ``P`` for the ``number``-th layer of the model.

        It is drawn as PEFT draws it, whose files may hold the seed alone, and on the CPU when the model is on the meta
        device.
        """
        self.group, self.tinylora_v, self.saves_projection = group, v, config.save_projection
        weight, r = stored_weight(self), len(self.tinylora_A)
        generator = torch.Generator().manual_seed(config.projection_seed + number)
        drawn = torch.normal(0.0, r**-0.5, (config.u, r, r), generator=generator)
        drawn = drawn.to("cpu" if weight.is_meta else weight.device, self.tinylora_A.dtype)
        self.tinylora_P = nn.Parameter(drawn, requires_grad=False)

    def file_name(self, path: str, tensor: str) -> str:
        return f"base_model.tinylora_v.{self.group}" if tensor == "tinylora_v" else super().file_name(path, tensor)

    def file_tensors(self) -> dict[str, torch.Tensor]:
        found = super().file_tensors()
        return found if self.saves_projection else {k: v for k, v in found.items() if k != "tinylora_P"}

    def mixture(self) -> torch.Tensor:
        """``R``: (r, r)."""
        return torch.einsum("u,uij->ij", self.tinylora_v, self.tinylora_P.to(self.tinylora_v.device))


class TinyLoraLinear(TinyLoraLayer, DeltaLinear):
    """TinyLoRA over a linear layer, with ``A: (r, in)`` and ``B: (out, r)``."""

    kinds = "linear layers and embeddings"

    def __init__(self, module: nn.Module, name: str, config: TinyLoraConfig):
        super().__init__(module, name, "TinyLoRA", config.bias, config.tinylora_dropout)
        self.decompose(dense_weight(module), config)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(F.linear(x, self.tinylora_A), self.mixture()), self.tinylora_B)

    def delta(self) -> torch.Tensor:
        return self.tinylora_B @ self.mixture() @ self.tinylora_A


class TinyLoraEmbedding(TinyLoraLayer):
    """TinyLoRA over an embedding, with ``A: (r, D)`` and ``B: (V, r)``."""

    def __init__(self, module: nn.Module, name: str, config: TinyLoraConfig):
        super().__init__(module)
        self.decompose(widened(base_module(module).weight.detach()), config)
        self.dropout = dropout_layer(config.tinylora_dropout)

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        chosen = self.dropout(F.embedding(x, self.tinylora_B))
        return y + (chosen @ self.mixture() @ self.tinylora_A).to(y.dtype)

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # the update is not scaled, as it is not in PEFT
        scale = getattr(base_module(self), "scalar_embed_scale", lookup_scale(self))
        delta = self.tinylora_B @ self.mixture() @ self.tinylora_A
        return {"weight": widened(base["weight"]) + delta / scale}


wrap = by_kind({nn.Embedding: TinyLoraEmbedding}, otherwise=TinyLoraLinear)


def attach(model: nn.Module, config: TinyLoraConfig, layers: Mapping[str, Any]) -> None:
    """Put the layers into groups of neighbours, and give each group its trained numbers."""
    own = list(layers.values())
    count = max(1, round(len(own) * (1 - config.weight_tying)))
    size = len(own) // count
    groups: dict[int, nn.Parameter] = {}
    for number, layer in enumerate(own):
        group = min(number // size, count - 1)
        if group not in groups:
            start = torch.zeros(config.u, **factory_kwargs(layer))
            if config.init_weights is not True:
                nn.init.uniform_(start, -config.init_v_bound, config.init_v_bound)
            groups[group] = nn.Parameter(start)
        layer.join(group, groups[group], number, config)
