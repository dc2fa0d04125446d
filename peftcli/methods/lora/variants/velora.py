"""VeLoRA: memory-efficient training with rank-1 sub-token projections (https://arxiv.org/abs/2405.17991).

For the gradient of A, training keeps one number of each group of inputs, its length along one direction, in place of
the inputs. What the layer computes is a plain LoRA.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.methods._delta import factory_kwargs
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.lora import LoraLinear


class VeloraLinear(LoraLinear):
    """A linear layer that trains A from compressed inputs. ``lora_velora_embed: (g,)`` is the direction of a group."""

    fixed = ("lora_velora_embed",)
    lora_velora_embed: torch.Tensor

    def __init__(self, base_layer: nn.Module, name: str, config: LoraConfig):
        super().__init__(base_layer, name, config)
        assert config.velora_config
        self.settings = config.velora_config
        like = factory_kwargs(base_layer)
        size = -(-self.view.in_features // self.settings.num_groups)
        start = torch.zeros(size, **like)
        if self.settings.init_type == "random":
            start = F.normalize(torch.randn(size, **like), dim=0)
        self.register_buffer("lora_velora_embed", start)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().update(x)
        kind = self.settings.init_type
        if kind == "batch_average" or (kind == "batch_average_once" and not self.lora_velora_embed.any()):
            self._follow(x.detach())
        z = _CompressedLinear.apply(x, self.lora_A.weight, self.lora_velora_embed, self.settings.scale)  # type: ignore[no-untyped-call]
        return self.scaling * self.lora_B(z)

    @torch.no_grad()
    def _follow(self, x: torch.Tensor) -> None:
        """Take the direction of the groups' average, or without one that of all ones."""
        mean = _groups(x, len(self.lora_velora_embed)).float().mean((0, 1))
        mean = torch.where(mean.norm() > 0, mean, torch.ones_like(mean))
        # a new tensor: the graph of an earlier micro-batch may hold the old one
        self.lora_velora_embed = (mean / mean.norm()).to(self.lora_velora_embed.dtype)


class _CompressedLinear(torch.autograd.Function):
    """``y = A x``; A's gradient sees ``scale * (x . v) v`` in place of each group of x, ``v`` being its direction."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, direction: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        ctx.save_for_backward(_groups(x, len(direction)) @ direction.to(x.dtype), a, direction)
        return F.linear(x, a)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        lengths, a, direction = ctx.saved_tensors
        gradient = gradients[0]
        dtype = gradient.dtype
        of_x = of_a = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ a.to(dtype)
        if ctx.needs_input_grad[1]:
            seen = (lengths.to(dtype).unsqueeze(-1) * direction.to(dtype)).flatten(1)[:, : a.shape[1]]
            of_a = (ctx.scale * (gradient.flatten(0, -2).T @ seen)).to(a.dtype)
        return of_x, of_a, None, None


def _groups(x: torch.Tensor, size: int) -> torch.Tensor:
    """Return the inputs (..., in) in groups, the last filled up with zeros: (tokens, groups, size)."""
    x = x.reshape(-1, x.shape[-1])
    return F.pad(x, (0, -x.shape[1] % size)).unflatten(1, (-1, size))
