"""The layers of RoAd (https://arxiv.org/abs/2409.00119)."""

from __future__ import annotations

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer, widened
from peftcli.errors import AdapterError
from peftcli.methods._delta import factory_kwargs, require_linear
from peftcli.methods.road import RoadConfig

_PER_OUTPUT = {"road_1": 0.5, "road_2": 1, "road_4": 2}


class RoadLinear(AdapterLayer):
    """``y' = c * y + s * y~`` with ``y = W x + b``: where ``y`` has a pair ``(y_1, y_2)``, ``y~`` has ``(-y_2, y_1)``.

    ``c = alpha cos(theta)`` and ``s = alpha sin(theta)``, so that a pair is turned by theta and scaled by alpha.
    """

    def __init__(self, module: nn.Module, name: str, config: RoadConfig):
        view = require_linear(module, name, "RoAd")
        super().__init__(module)
        self.view, self.reach, self.variant = view, config.group_size // 2, config.variant
        if view.out_features % config.group_size:
            text = f"{config.group_size} does not divide {view.out_features}, the outputs of {name}"
            raise AdapterError(text, key="group_size")
        size, like = int(_PER_OUTPUT[config.variant] * view.out_features), factory_kwargs(self)
        self.road_theta = nn.Parameter(torch.zeros(size, **like))
        self.road_alpha = nn.Parameter(torch.ones(size, **like))
        if not config.init_weights:
            nn.init.normal_(self.road_theta, std=0.5)
            nn.init.normal_(self.road_alpha, mean=1, std=0.5)

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.turned(y.to(self.road_theta.dtype)).to(y.dtype)

    def turned(self, y: torch.Tensor) -> torch.Tensor:
        """Return the outputs (..., out), turned and scaled."""
        cosines, sines = self._factors()
        first, second = y.unflatten(-1, (-1, 2, self.reach)).unbind(-2)
        return y * cosines + torch.stack((-second, first), -2).flatten(-3) * sines

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        wide = {name: widened(value) for name, value in base.items()}
        merged = {"weight": self.view.as_stored(self.turned(self.view.as_stored(wide["weight"]).T).T)}
        return merged | ({"bias": self.turned(wide["bias"])} if "bias" in wide else {})

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``c`` and ``s``: (out,) each."""
        theta, alpha = self.road_theta, self.road_alpha
        if self.variant == "road_4":  # in each group those of c, then those of s
            (theta_c, theta_s), (alpha_c, alpha_s) = (
                value.unflatten(0, (-1, 2, 2 * self.reach)).transpose(0, 1).flatten(1) for value in (theta, alpha)
            )
            return alpha_c * theta_c.cos(), alpha_s * theta_s.sin()
        if self.variant == "road_1":  # the two of a pair alike
            theta, alpha = (
                value.unflatten(0, (-1, self.reach)).repeat_interleave(2, 0).flatten() for value in (theta, alpha)
            )
        return alpha * theta.cos(), alpha * theta.sin()


wrap = RoadLinear
