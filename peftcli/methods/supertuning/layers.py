"""The layer of Super-Tuning (https://arxiv.org/abs/2607.09287)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.linear import dense_weight
from peftcli.methods._delta import WeightDeltaLinear, draw_as_linear, dropout_layer, factory_kwargs, scattered
from peftcli.methods.supertuning import SupertuningConfig


class SupertuningLinear(WeightDeltaLinear):
    """``delta`` is zero but for the trained numbers, which stand where the weight's are largest, or smallest.

    With ``r`` it is that and a LoRA: ``A: (r, in)`` and ``B: (out, r)``, which starts at zero.
    """

    fixed = ("supertuning_indices",)
    larger_rate = ("supertuning_lora_B.weight",)
    supertuning_indices: torch.Tensor

    def __init__(self, module: nn.Module, name: str, config: SupertuningConfig):
        super().__init__(module, name, "Super-Tuning")
        like, r, size = factory_kwargs(self), config.r, self.view.in_features * self.view.out_features
        self.count = max(1, int(size * (1 - config.sparsity)))
        self.largest, self.saves_fixed = config.select_top, config.save_precomputed_indices
        start = torch.zeros if config.init_weights else torch.randn
        self.supertuning_values = nn.Parameter(start(self.count, **like))
        self.register_buffer("supertuning_indices", self._chosen(dense_weight(module)))
        self.scaling = 0.0 if r is None else (2.0 if config.lora_alpha is None else config.lora_alpha / r)
        if r is not None:
            self.supertuning_lora_A = nn.Linear(self.view.in_features, r, bias=False, **like)
            self.supertuning_lora_B = nn.Linear(r, self.view.out_features, bias=False, **like)
            self.lora_dropout = dropout_layer(config.lora_dropout)
            draw_as_linear(self.supertuning_lora_A.weight, self.supertuning_lora_B.weight)
            if config.init_weights:
                nn.init.zeros_(self.supertuning_lora_B.weight)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        sparse = F.linear(x, scattered(self.supertuning_values, self.supertuning_indices.long(), self.view))
        if not self.scaling:
            return sparse
        return sparse + self.scaling * self.supertuning_lora_B(self.supertuning_lora_A(self.lora_dropout(x)))

    def delta_of(self, weight: torch.Tensor) -> torch.Tensor:
        places = self.supertuning_indices
        if places.is_meta:  # the file does not hold them, and the base weight comes only now
            places = self._chosen(self.view.as_stored(weight))
        delta = scattered(self.supertuning_values, places.long(), self.view)
        if self.scaling:
            delta = delta + self.scaling * (self.supertuning_lora_B.weight @ self.supertuning_lora_A.weight)
        return self.view.as_stored(delta)

    def _chosen(self, weight: torch.Tensor) -> torch.Tensor:
        """Places in a flat weight (out, in) of the numbers that train, on the CPU: the same on every device."""
        sizes = weight.abs().flatten()
        sizes = sizes if sizes.is_meta else sizes.cpu()
        return sizes.topk(self.count, largest=self.largest).indices.int().to(weight.device)


wrap = SupertuningLinear
