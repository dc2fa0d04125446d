"""The layers of LN tuning (https://arxiv.org/abs/2312.11420)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer, TrainedCopy, base_module, base_modules, first_parameter
from peftcli.core.targets import find_targets, model_type, module_matches, shortest_names
from peftcli.errors import AdapterError
from peftcli.methods._families import TARGETS
from peftcli.methods.ln_tuning import LNTuningConfig


class TrainedNorm(TrainedCopy):
    """A norm that is trained as a whole, with names of its own in the file; it gives the base layer's dtype."""

    def file_name(self, path: str, tensor: str) -> str:
        return super().file_name(path, tensor if tensor.startswith("base_layer.") else f"ln_tuning_layers.{tensor}")

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(x, *args, **kwargs)
        if not self.enabled or not torch.is_tensor(y):
            return y
        dtype = x.dtype
        if dtype != first_parameter(base_module(self)).dtype:  # what comes out then differs from norm to norm
            with torch.no_grad():
                dtype = self.base_layer(x[:0], *args, **kwargs).dtype
        return y.to(dtype)


def wrap(module: nn.Module, name: str, config: LNTuningConfig) -> AdapterLayer:
    """The layer that trains ``module``."""
    base: nn.Module = base_module(module)
    if next(base.buffers(), None) is not None:
        kind = type(base).__name__
        raise AdapterError(f"{name} is a {kind}, with running statistics; LN tuning trains none", key="target_modules")
    if next(base.parameters(), None) is None:
        raise AdapterError(f"{name} is a {type(base).__name__}, with nothing to train", key="target_modules")
    return TrainedNorm(module, config.file_prefix)


def targets(model: nn.Module, config: LNTuningConfig) -> list[str]:
    """Return the names of the norms to train."""
    if config.target_modules is None:
        reached = [name for name in norms(model) if name not in config.unreached]
        usual, names = TARGETS["ln_tuning"].get(model_type(model), ()), base_modules(model)
        # some Falcons have other norms than the family's first
        is_usual = all(any(module_matches(name, entry) for name in names) for entry in usual)
        config.target_modules = list(usual if is_usual else ()) or shortest_names(model, reached)
    return find_targets(model, config)


def norms(model: nn.Module) -> list[str]:
    """Names of the model's modules that are some LayerNorm or RMSNorm."""
    return [
        name
        for name, module in base_modules(model).items()
        if (isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("LayerNorm", "RMSNorm")))
        and next(module.parameters(), None) is not None
    ]
