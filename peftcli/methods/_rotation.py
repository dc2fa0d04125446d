"""The base of methods that rotate a layer's inputs: ``y = W (R x) + b``, so ``W' = W R``, with an orthogonal ``R``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer, base_module, widened
from peftcli.methods._delta import WeightDeltaConv, check_ungrouped, require_linear, with_bias


class Rotating(AdapterLayer):
    """A layer with a rotation of its inputs."""

    method: str
    """The method's name in messages."""

    def start(self, features: int, name: str, config: Any) -> None:
        """Make the weights that rotate ``features`` inputs of the module ``name``."""
        raise NotImplementedError

    def rotated(self, rows: torch.Tensor, back: bool = False) -> torch.Tensor:
        """Each of the rows (..., in) rotated, or rotated back. The rows have the adapter's dtype."""
        raise NotImplementedError

    def scaled(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` (out, in), once its rows are rotated. A place for a scale of the outputs."""
        return weight

    def turned(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the new weight (out, in), in the adapter's dtype."""
        return self.scaled(self.rotated(weight, back=True))


class RotatedLinear(Rotating):
    """``y = W R x + b`` for a linear layer: the input is rotated, since it is smaller than the weight."""

    def __init__(self, module: nn.Module, name: str, config: Any):
        view = require_linear(module, name, self.method, "linear layers and Conv2d")
        super().__init__(with_bias(module, config.bias))
        self.view = view
        self.start(view.in_features, name, config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.enabled:
            x = self.rotated(widened(x)).to(x.dtype)
        return self.base_layer(x, *args, **kwargs)

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weight = widened(self.view.as_stored(base["weight"]))
        return {"weight": self.view.as_stored(self.turned(weight))}


class RotatedConv(Rotating, WeightDeltaConv):
    """The same for a convolution: what is rotated is the part of the input that the kernel sees."""

    def __init__(self, module: nn.Module, name: str, config: Any):
        check_ungrouped(module, name, self.method)
        super().__init__(module, config.bias)
        self.start(base_module(module).weight[0].numel(), name, config)

    def delta_of(self, weight: torch.Tensor) -> torch.Tensor:
        return self.turned(weight.flatten(1)).view(weight.shape) - weight


def skew_of(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """The skew matrices (..., size, size) whose upper triangles hold ``numbers`` (..., size (size - 1) / 2)."""
    rows, columns = torch.triu_indices(size, size, 1, device=numbers.device)
    upper = numbers.new_zeros(*numbers.shape[:-1], size, size)
    upper[..., rows, columns] = numbers
    return upper - upper.mT


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """``(I - S) (I + S)^-1``, a rotation. Computed without autocast."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    with torch.autocast(skew.device.type, enabled=False):
        return torch.linalg.solve(identity + skew, identity - skew, left=False)


def neumann(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """``I + 2 S + 2 S^2 + ...``, which comes near ``cayley(-S)`` while ``S`` is small. Computed without autocast.

    Of the powers up to ``terms - 1`` the last one counts once. 3 terms are as 4, as in PEFT.
    """
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    if terms < 3:
        return identity + 2 * skew * (terms - 1)
    total, power = 2 * skew, skew
    with torch.autocast(skew.device.type, enabled=False):
        for _ in range(2, max(terms - 1, 3)):
            power = power @ skew
            total = total + 2 * power
        return identity + (total + power @ skew)


def leave_out(blocks: torch.Tensor, share: float) -> torch.Tensor:
    """``blocks`` (..., k, k), of which a random share are the identity."""
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    gone = torch.rand(blocks.shape[:-2], device=blocks.device) < share
    return torch.where(gone[..., None, None], identity, blocks)
