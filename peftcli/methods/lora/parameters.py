"""LoRA on weights that a module multiplies by itself, without a layer that could be wrapped: attention, experts."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer, TrainedCopy, adapter_dtype, base_module, layers_at, widened
from peftcli.core.targets import named_parameters
from peftcli.errors import AdapterError
from peftcli.methods._delta import factory_kwargs
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.initialisations.start import initialise
from peftcli.methods.lora.lora import LoraLayer, LoraLinear, check_size


class InsideLayer(LoraLayer):
    """A module that computes with ``W + delta`` in place of each of its weights ``adapted``."""

    @property
    def adapted(self) -> tuple[str, ...]:
        """The names of these weights."""
        raise NotImplementedError

    def with_delta(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return ``weight``, the module's parameter ``name``, with the adapter's delta, in the weight's own dtype."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.base_layer(*args, **kwargs)
        below = "base_layer." * len(layers_at(self.base_layer))
        # an outer adapter's weights stand in the module already while it calls this one
        current = {name: operator.attrgetter(name)(base_module(self)) for name in self.adapted}
        weights = {f"{below}{name}": self.with_delta(name, weight) for name, weight in current.items()}
        return torch.func.functional_call(self.base_layer, weights, args, kwargs)

    def overrides(self, below: AdapterLayer) -> bool:
        return isinstance(below, TrainedCopy) and base_module(below) is base_module(self)

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: self.with_delta(name, widened(base[name])) for name in self.adapted}


class LoraAttention(InsideLayer):
    """``nn.MultiheadAttention``: one pair for the projection of queries, keys and values, one for the output's.

    ``A: (r, D)``, ``B: (3 D, r)`` and ``out.A: (r, D)``, ``out.B: (D, r)``. PEFT adds the output's delta twice, in
    training as in merging, so that is what its files mean, and so does this layer.
    """

    def __init__(self, base_layer: nn.Module, name: str, config: LoraConfig):
        super().__init__(base_layer, name, config)
        attention = base_module(base_layer)
        if not attention._qkv_same_embed_dim:
            raise AdapterError(f"{name} has keys or values of another width; LoRA needs one", key="target_modules")
        width, like = attention.embed_dim, factory_kwargs(attention.out_proj)
        self.in_features, self.out_features = width, 3 * width
        self.lora_A = nn.Linear(width, self.r, bias=False, **like)
        self.lora_B = nn.Linear(self.r, 3 * width, bias=False, **like)
        down, up = nn.Linear(width, self.r, bias=False, **like), nn.Linear(self.r, width, bias=False, **like)
        self.out = nn.ModuleDict({"lora_A": down, "lora_B": up})
        for a, b in ((self.lora_A, self.lora_B), (down, up)):
            initialise(a.weight, b.weight, config.init_lora_weights, self.scaling, lambda: attention.out_proj.weight)

    @property
    def adapted(self) -> tuple[str, ...]:
        """The names of both weights now: the biases of another adapter may train around the output's projection."""
        around = "base_layer." * len(layers_at(base_module(self).out_proj))
        return ("in_proj_weight", f"out_proj.{around}weight")

    def file_name(self, path: str, tensor: str) -> str:
        return super().file_name(path, tensor.replace("out.", "base_layer.out_proj.", 1))

    def with_delta(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        pair, times = (self, 1) if name == "in_proj_weight" else (self.out, 2)
        a, b = operator.attrgetter("lora_A.weight", "lora_B.weight")(pair)
        return torch.addmm(weight, b.to(weight.dtype), a.to(weight.dtype), alpha=times * self.scaling)


class LoraOutputProjection(LoraLinear):
    """The output projection of an ``nn.MultiheadAttention``, which reads its weight and never calls it.

    Dropout cannot be applied. PEFT leaves such a layer without effect until it is merged.
    """

    @property
    def weight(self) -> torch.Tensor:
        """The weight that the attention reads."""
        weight: torch.Tensor = self.base_layer.weight
        return weight + self.delta().to(weight.dtype) if self.enabled else weight


class LoraParameter(InsideLayer):
    """One parameter of a module: ``(out, in)``, or of E experts ``(E, out, in)``, or ``(E, in, out)``.

    As PEFT stores them: ``A: (E * r, in)`` with an expert's rows together, ``B: (out, r * E)`` with an expert's columns
    apart.
    """

    peft_name = "lora.ParamWrapper"

    def __init__(self, base_layer: nn.Module, parameter: str, name: str, config: LoraConfig):
        name = f"{name}.{parameter}"
        super().__init__(base_layer, name, config)
        self.parameter = parameter
        weight: torch.Tensor = getattr(base_module(base_layer), parameter)
        if weight.ndim not in (2, 3):
            shape = tuple(weight.shape)
            raise AdapterError(f"{name} has the shape {shape}; LoRA adapts matrices", key="target_parameters")
        self.transposed = weight.ndim == 3 and getattr(base_module(base_layer), "is_transposed", False)
        self.experts = len(weight) if weight.ndim == 3 else 1
        out, inputs = (weight.mT if self.transposed else weight).shape[-2:]
        check_size(self.r, (out, inputs), name)
        like: dict[str, Any] = {"bias": False, "device": weight.device, "dtype": adapter_dtype(weight)}
        self.lora_A = nn.Linear(inputs, self.r * self.experts, **like)
        self.lora_B = nn.Linear(self.r * self.experts, out, **like)
        for a, b in zip(*self.pairs(), strict=True):
            initialise(a, b, config.init_lora_weights, self.scaling, lambda: weight)

    @property
    def adapted(self) -> tuple[str, ...]:
        return (self.parameter,)

    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the experts' A ``(E, r, in)`` and B ``(E, out, r)``."""
        a, b = self.lora_A.weight, self.lora_B.weight
        return a.view(self.experts, self.r, -1), b.view(len(b), self.r, self.experts).permute(2, 0, 1)

    def with_delta(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        a, b = (part.to(weight.dtype) for part in self.pairs())
        left, right = (a.mT, b.mT) if self.transposed else (b, a)
        return torch.baddbmm(weight.view(-1, *weight.shape[-2:]), left, right, alpha=self.scaling).view(weight.shape)


def check_attention(name: str, config: LoraConfig) -> None:
    """Raise AdapterError for a setting that means nothing in ``nn.MultiheadAttention``, which calls no layers."""
    off = {"use_dora": False, "lora_bias": False, "bias": "none"}
    if not config.inference_mode:
        off["lora_dropout"] = 0.0
    for key, value in off.items():
        if getattr(config, key) != value:
            raise AdapterError(f"is not supported for {name}, in a MultiheadAttention; only {value!r} is", key=key)


def wrap_parameters(module: nn.Module, name: str, config: LoraConfig) -> LoraLayer:
    """Wrap each parameter of ``module`` that is a target, one layer over the other."""
    for parameter in named_parameters(module, name, config):
        module = LoraParameter(module, parameter, name, config)
    assert isinstance(module, LoraLayer)
    return module
