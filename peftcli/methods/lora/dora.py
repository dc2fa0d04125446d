"""DoRA: Weight-Decomposed Low-Rank Adaptation (https://arxiv.org/abs/2402.09353)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import AdapterLayer, TrainedBias, adapter_dtype, bare
from peftcli.core.linear import dense_weight
from peftcli.methods.lora.conv import LoraConv
from peftcli.methods.lora.layers import LoraEmbedding, LoraLayer, LoraLinear, LoraPair
from peftcli.methods.lora.residual_init import ReadLinear, ResidualLinear, StartedLinear


class Dora(LoraLayer):
    """``V = m * (W + delta) / |W + delta|``: a trained length for each output, beside LoRA's change of direction.

    No gradient flows through the norm, as in section 4.3 of the paper. Among several adapters on one layer, each takes
    its norm with the base model's own weight.
    """

    def __init__(self, base_layer: nn.Module, *args: Any):
        super().__init__(base_layer, *args)
        self.lora_magnitude_vector = nn.Parameter(self.norm(self.direction()))

    def norm(self, weight: torch.Tensor) -> torch.Tensor:
        """Length of each output's part of a weight in the base layer's own orientation, shaped as PEFT stores it."""
        raise NotImplementedError

    def beside_weight(self, factor: torch.Tensor) -> torch.Tensor:
        """A factor for each output, shaped so that it multiplies the base weight."""
        return factor

    @torch.no_grad()
    def direction(self) -> torch.Tensor:
        """``W + delta``."""
        return self.base_weight() + self.delta()

    def base_weight(self) -> torch.Tensor:
        """The base model's weight in its own orientation, detached, in the adapter's dtype."""
        weight: torch.Tensor = bare(self).weight.detach()
        return weight.to(adapter_dtype(weight))

    def factor(self) -> torch.Tensor:
        """``m / |W + delta|``."""
        return self.length_over(self.direction())

    def length_over(self, weight: torch.Tensor) -> torch.Tensor:
        """``m / |weight|``, where an output that the base model has not yet is no division by zero."""
        norm = self.norm(weight)
        return self.lora_magnitude_vector / norm.clamp(min=torch.finfo(norm.dtype).tiny)

    def folded(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        below = self.base_layer.folded(base) if isinstance(self.base_layer, AdapterLayer) else {}
        if not self.enabled:
            return below
        own = self.merged_tensors(base)["weight"]
        factor = self.beside_weight(self.length_over(own))
        return below | {"weight": factor * self.merged_tensors(base | below)["weight"]}


class DoraPair(Dora, LoraPair):
    """DoRA on a layer with a bias: ``y = m / |W + delta| * (W + delta) x + b``."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if not self.enabled:
            return y
        seen = self.dropout(x.to(self.lora_A.weight.dtype))
        dropped = self.training and not isinstance(self.dropout, nn.Identity)
        plain = self.base_output(seen) if dropped else self.without_bias(y)
        factor = self.along_output(self.factor())
        return y + ((factor - 1) * plain + factor * self.update(seen)).to(y.dtype)

    def without_bias(self, y: torch.Tensor) -> torch.Tensor:
        """The base layer's output less its bias."""
        bias = _bias(self.base_layer)
        return y if bias is None else y - self.along_output(bias)

    def base_output(self, x: torch.Tensor) -> torch.Tensor:
        """``W x``."""
        raise NotImplementedError

    def along_output(self, values: torch.Tensor) -> torch.Tensor:
        """One value for each output, shaped so that it goes with the layer's output."""
        return values


class DoraLinear(DoraPair, LoraLinear):
    """DoRA on a linear layer; ``lora_magnitude_vector: (out,)``."""

    def norm(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.linalg.norm(self.view.as_stored(weight), dim=1)

    def beside_weight(self, factor: torch.Tensor) -> torch.Tensor:
        return self.view.as_stored(factor[:, None])

    def base_weight(self) -> torch.Tensor:
        return self.view.as_stored(dense_weight(self))

    def base_output(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, dense_weight(self))


class DoraConv(DoraPair, LoraConv):
    """DoRA on a convolution; ``lora_magnitude_vector: (1, out, 1, ...)``."""

    def norm(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flatten(1).norm(dim=1).view(1, -1, *[1] * (weight.ndim - 2))

    def beside_weight(self, factor: torch.Tensor) -> torch.Tensor:
        return factor.transpose(0, 1)

    def along_output(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, *[1] * len(bare(self).kernel_size))

    def base_output(self, x: torch.Tensor) -> torch.Tensor:
        return bare(self)._conv_forward(x, self.base_weight(), None)


class DoraEmbedding(Dora, LoraEmbedding):
    """DoRA on an embedding: a length for each of the D columns; ``lora_magnitude_vector: (D,)``."""

    def norm(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.linalg.norm(weight, dim=0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(ids)
        return (self.factor() * (y + self.update(ids))).to(y.dtype) if self.enabled else y


class DoraStartedLinear(DoraLinear, StartedLinear):
    """DoRA whose A and B start from the base weight or the training data."""

    def file_tensors(self) -> dict[str, torch.Tensor]:
        return {**super().file_tensors(), "lora_magnitude_vector": self.lora_magnitude_vector}


class DoraReadLinear(DoraLinear, ReadLinear):
    """The same, from a file of PEFT's."""


class DoraResidualLinear(DoraLinear, ResidualLinear):
    """The same, for a base model whose weights come one by one."""


DORA: dict[type[LoraLayer], Any] = {
    LoraEmbedding: DoraEmbedding,
    LoraConv: DoraConv,
    LoraLinear: DoraLinear,
    StartedLinear: DoraStartedLinear,
    ReadLinear: DoraReadLinear,
    ResidualLinear: DoraResidualLinear,
}
"""The layer of LoRA -> the one with lengths."""


def _bias(module: Any) -> torch.Tensor | None:
    """The bias that a layer adds now, below adapter layers some of which may be disabled."""
    if isinstance(module, AdapterLayer) and not (isinstance(module, TrainedBias) and module.enabled):
        return _bias(module.base_layer)
    return module.bias
