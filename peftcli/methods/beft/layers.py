"""The layers of BEFT (https://arxiv.org/abs/2509.15974)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer
from peftcli.errors import AdapterError
from peftcli.methods._delta import factory_kwargs, require_linear
from peftcli.methods.beft import BeftConfig


class BeftLinear(AdapterLayer):
    """``y = W x + b + c`` with ``c: (1, out)``, which starts at zero."""

    def __init__(self, module: nn.Module, name: str, config: BeftConfig):
        view = require_linear(module, name, "BEFT")
        super().__init__(module)
        start = torch.zeros if config.init_weights else torch.randn
        self.beft_bias = nn.Parameter(start(1, view.out_features, **factory_kwargs(self)))

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (y + self.beft_bias[0]).to(y.dtype)

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if "bias" not in base:
            raise AdapterError("BEFT cannot be merged here: the base model has no bias in the adapted layers")
        return {"bias": base["bias"] + self.beft_bias[0]}


def attach(model: nn.Module, config: BeftConfig, layers: Mapping[str, AdapterLayer]) -> None:
    """Note a layer that has no bias: the adapter cannot be merged then."""
    config.without_bias = next((name for name, layer in layers.items() if layer.bias is None), None)


wrap = BeftLinear
