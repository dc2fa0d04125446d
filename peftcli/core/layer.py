"""The adapter layer: a frozen base layer and the weights of one adapter beside it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from peftcli.errors import AdapterError


class AdapterLayer(nn.Module):
    """A base layer of the model with one adapter's weights beside it.

    A layer holds one adapter, so its parameters carry the names that the adapter file gives them. Attributes that
    the layer does not have itself (``weight``, ``in_features``) are the base layer's, since models read them.
    """

    file_prefix = "base_model.model."
    base_layer: Any
    """The layer of the model, or another adapter layer over it."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.enabled = True
        self.train(base_layer.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not set yet: a copy in the making
                raise
            return getattr(self.base_layer, name)

    def own_tensors(self) -> dict[str, nn.Parameter]:
        """The adapter's tensors: name below the layer -> parameter."""
        return {name: value for name, value in self.named_parameters() if not name.startswith("base_layer.")}

    def own_module(self, path: str) -> nn.Module:
        """The module below the layer, as ``own_tensors`` names it, that holds a tensor."""
        return self.get_submodule(path)

    def file_name(self, path: str, tensor: str) -> str:
        """Name in the adapter file of ``tensor`` when the layer stands at ``path`` in the model."""
        return f"{self.file_prefix}{path}.{tensor}"

    def accepts(self, tensor: str, value: torch.Tensor) -> torch.Tensor:
        """``value`` of a file as this layer holds ``tensor``. A place for other writers' shapes."""
        return value

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The base layer's tensors that change when the adapter is folded in, in float32 or wider.

        Raises:
            AdapterError: this kind of layer cannot be merged.
        """
        raise AdapterError(f"{type(self).__name__} cannot be merged into the base model")

    def folded(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``merged_tensors`` of this layer and of the adapter layers below it."""
        below = self.base_layer.folded(base) if isinstance(self.base_layer, AdapterLayer) else {}
        return below | self.merged_tensors(base | below)

    def merge(self) -> nn.Module:
        """The base layer with the adapter folded in. Its parameters are new: ties to other layers end here."""
        base: nn.Module = self
        while isinstance(base, AdapterLayer):
            base = base.base_layer
        with torch.no_grad():
            tensors = dict(base.named_parameters())
            for name, value in self.folded(dict(tensors)).items():
                owner, _, leaf = name.rpartition(".")
                merged = nn.Parameter(value.to(tensors[name].dtype), requires_grad=False)
                setattr(base.get_submodule(owner), leaf, merged)
        return base


class TrainedCopy(AdapterLayer):
    """A module of modules_to_save: a copy is trained in full, the original stays for when the adapter is disabled."""

    def __init__(self, base_layer: nn.Module, file_prefix: str):
        super().__init__(base_layer)
        self.file_prefix = file_prefix
        self.copy = copy.deepcopy(base_layer)
        for parameter in self.copy.parameters():
            parameter.data = parameter.data.to(adapter_dtype(parameter))
            parameter.requires_grad_(True)

    def own_tensors(self) -> dict[str, nn.Parameter]:
        return dict(self.copy.named_parameters())

    def own_module(self, path: str) -> nn.Module:
        return self.copy.get_submodule(path)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.base_layer(x, *args, **kwargs)
        if torch.is_floating_point(x) and not torch.is_autocast_enabled(x.device.type):
            x = x.to(next(self.copy.parameters()).dtype)
        return self.copy(x, *args, **kwargs)

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(self.own_tensors())


class TrainedBias(AdapterLayer):
    """A base layer whose bias is trained beside it (``bias: all`` and ``bias: lora_only``)."""

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        bias = self.base_layer.bias
        # not by attribute: the base layer's bias, seen through __getattr__, would count as taken
        self._parameters["bias"] = nn.Parameter(bias.detach().to(adapter_dtype(bias)).clone())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.base_layer(*args, **kwargs)
        bias = {"bias": self.bias.to(self.base_layer.bias.dtype)}
        return torch.func.functional_call(self.base_layer, bias, args, kwargs)

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"bias": self.bias}


def adapter_dtype(like: torch.Tensor) -> torch.dtype:
    """The dtype of adapter weights beside ``like``: float32, or wider where the base model is wider."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Every adapter layer of the model by its path, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}
