"""The bases of methods that add a delta to the weight of a linear layer or a convolution."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import (
    AdapterLayer,
    TrainedBias,
    adapter_dtype,
    adapter_layers,
    base_module,
    first_parameter,
    offloaded_to_run_on,
    widened,
)
from peftcli.core.linear import Linear, dense_weight, linear_view
from peftcli.core.quantised import is_packed
from peftcli.errors import AdapterError

LayerKind = TypeVar("LayerKind", bound=AdapterLayer)
_LARGEST_R = 4096  # of drawn tensors, which may be larger than a small layer


class DeltaLinear(AdapterLayer):
    """``y = (W + delta) x + b`` with ``delta: (out, in)``, made of the adapter's weights."""

    kinds = "Linear and Conv1D"
    """What the method adapts, in messages."""

    def __init__(self, module: nn.Module, name: str, method: str, bias: str = "none", dropout: float = 0.0):
        view = require_linear(module, name, method, self.kinds)
        super().__init__(with_bias(module, bias))
        self.view = view
        self.dropout = dropout_layer(dropout)

    def delta(self) -> torch.Tensor:
        """Return what the adapter adds to the weight: (out, in)."""
        raise NotImplementedError

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the adapter adds to the output for the input ``x``, which has the adapter's dtype: (..., out)."""
        delta = self.delta()
        return F.linear(x.to(delta.dtype), delta)

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        dtype = first_parameter(self).dtype
        return y + self.update(self.dropout(x.to(dtype))).to(y.dtype)

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"weight": widened(base["weight"]) + self.view.as_stored(self.delta())}


class LowRank(DeltaLinear):
    """``delta = scaling * second @ first`` with ``first: (r, in)`` and ``second: (out, r)``.

    Some of its tensors may be one for the whole model; their names in the file have no path.
    """

    scaling = 1.0
    shared: tuple[str, ...] = ()
    """Names of those tensors."""

    def file_name(self, path: str, tensor: str) -> str:
        return f"base_model.{tensor}" if tensor in self.shared else super().file_name(path, tensor)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the matrices that an input goes through, the first and the second."""
        raise NotImplementedError

    def update(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.factors()
        z = F.linear(F.linear(x, first), second)
        return z if self.scaling == 1 else self.scaling * z

    def delta(self) -> torch.Tensor:
        first, second = self.factors()
        return self.scaling * (second @ first)

    def projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the columns and rows of ``share_projections`` that the layer uses: (rows, in) and (out, r)."""
        device = first_parameter(self).device
        a, b = (getattr(self, name) for name in self.shared)
        return a[:, : self.view.in_features].to(device), b[: self.view.out_features].to(device)


class WeightDelta(AdapterLayer):
    """A layer whose delta is made from the base weight.

    Among several adapters on one layer, each one's delta is made from the base model's own weight, whatever the others
    add to it.
    """

    def delta_of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return what the adapter adds to the base weight ``weight``, both in the layer's own orientation."""
        raise NotImplementedError

    def folded_over(self, base: dict[str, torch.Tensor], below: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weight = widened(base["weight"])
        return {"weight": below.get("weight", weight) + self.delta_of(weight)}


class WeightDeltaLinear(WeightDelta, DeltaLinear):
    """A linear layer whose delta is made from its weight."""

    def delta(self) -> torch.Tensor:
        return self.view.as_stored(self.delta_of(self.view.as_stored(dense_weight(self))))


def by_kind(kinds: Mapping[type | tuple[type, ...], Callable[..., Any]], otherwise: Callable[..., Any]) -> Any:
    """Return a ``wrap`` that makes the layer of the first of the ``kinds`` that the base module is of."""

    def wrap(module: nn.Module, name: str, config: Any) -> AdapterLayer:
        base = base_module(module)
        make = next((make for kind, make in kinds.items() if isinstance(base, kind)), otherwise)
        return make(module, name, config)

    return wrap


def with_bias(module: nn.Module, bias: str) -> nn.Module:
    """Return ``module``, with its bias trained if the setting ``bias`` says so and it has one."""
    return TrainedBias(module) if bias != "none" and getattr(module, "bias", None) is not None else module


def dropout_layer(share: float) -> nn.Module:
    """Return dropout, or an identity that does not copy the input."""
    return nn.Dropout(share) if share else nn.Identity()


def draw_as_linear(*tensors: torch.Tensor) -> None:
    """Fill matrices as nn.Linear draws its weight."""
    for tensor in tensors:
        nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


def lookup_scale(layer: AdapterLayer) -> Any:
    """Return what an embedding multiplies its rows by. Updates are scaled alike, so that merging changes nothing."""
    return getattr(base_module(layer), "embed_scale", 1.0)


def layers_of_kind(model: nn.Module, kind: type[LayerKind], adapter: str | None = None) -> dict[str, LayerKind]:
    """Return the model's adapter layers of this class, by path; of one adapter, if it is named."""
    return {path: layer for path, layer in adapter_layers(model, adapter).items() if isinstance(layer, kind)}


def stored_weight(module: nn.Module) -> torch.Tensor:
    """Return the tensor that stores the layer's weight, whatever the format; its device is the layer's."""
    layer = base_module(module)
    return layer.qweight if is_packed(layer) else layer.weight


def require_linear(module: nn.Module, name: str, method: str, kinds: str = "Linear and Conv1D") -> Linear:
    """Return the view of ``module``.

    Raises:
        AdapterError: it is not a linear layer, and ``method`` adapts ``kinds`` only.
    """
    view = linear_view(module)
    if view is None:
        found = f"{name} is a {type(base_module(module)).__name__}; {method} adapts {kinds}"
        raise AdapterError(found, key="target_modules")
    return view


def check_ungrouped(module: nn.Module, name: str, method: str) -> None:
    """Raise AdapterError for a convolution with groups, which ``method`` does not adapt."""
    if base_module(module).groups > 1:
        found = f"{name} is a grouped convolution; {method} adapts those without groups"
        raise AdapterError(found, key="target_modules")


def factory_kwargs(layer: nn.Module) -> dict[str, Any]:
    """Return the device and dtype for adapter weights of a layer."""
    weight = stored_weight(layer)
    return {"device": offloaded_to_run_on(layer) or weight.device, "dtype": adapter_dtype(weight)}


def in_base_dtype(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the tensor in the dtype of a base weight, unless that is quantised, as PEFT has it before it widens it."""
    return tensor.to(weight.dtype) if weight.is_floating_point() else tensor


def check_drawn(r: int, layers: Iterable[Any]) -> None:
    """Raise AdapterError for an r that is too large for tensors that all layers share and no file need hold."""
    widest = max(side for layer in layers for side in (layer.view.in_features, layer.view.out_features))
    if r > max(_LARGEST_R, 2 * widest):
        raise AdapterError(f"{r:,} is far larger than the layers, whose largest side is {widest:,}", key="r")


def share_projections(layers: Sequence[Any], method: str, rows: int, r: int, seed: int) -> None:
    """Draw ``A: (rows, in)`` and ``B: (out, r)``, as wide and as tall as the largest layer needs, for every layer.

    They are drawn as PEFT draws them: its files may hold the seed alone.
    """
    check_drawn(r, layers)
    a = torch.empty(rows, max(layer.view.in_features for layer in layers))
    b = torch.empty(max(layer.view.out_features for layer in layers), r)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (a, b):
        nn.init.kaiming_uniform_(tensor, generator=generator)
    share_tensors(layers, {f"{method}_A": a, f"{method}_B": b})


def share_tensors(layers: Sequence[AdapterLayer], tensors: Mapping[str, torch.Tensor]) -> None:
    """Give every layer these tensors, which never train, as parameters under their names.

    They stay on the CPU when the model is on the meta device: the adapter's file need not hold them.
    """
    weight = stored_weight(layers[0])
    device = "cpu" if weight.is_meta else weight.device
    for name, tensor in tensors.items():
        parameter = nn.Parameter(in_base_dtype(tensor, weight).to(device, adapter_dtype(weight)), requires_grad=False)
        for layer in layers:
            setattr(layer, name, parameter)


class DeltaConv(AdapterLayer):
    """A convolution with the kernel ``W + delta``, both ``(out, in / groups, k...)``."""

    def __init__(self, module: nn.Module, bias: str = "none", dropout: float = 0.0):
        super().__init__(with_bias(module, bias))
        self.dropout = dropout_layer(dropout)

    def delta(self) -> torch.Tensor:
        """Return what the adapter adds to the kernel."""
        raise NotImplementedError

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the adapter adds to the output for the input ``x``, which has the adapter's dtype."""
        # with the stride, padding, ... of the base layer
        return base_module(self)._conv_forward(x, self.delta().to(x.dtype), None)

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + self.update(self.dropout(widened(x))).to(y.dtype)

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"weight": widened(base["weight"]) + self.delta()}


class WeightDeltaConv(WeightDelta, DeltaConv):
    """A convolution whose delta is made from its kernel."""

    def delta(self) -> torch.Tensor:
        return self.delta_of(widened(base_module(self).weight.detach()))


def base_product(layer: AdapterLayer, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    """``W x`` with the base model's own weight, without bias: (..., out), in float32 or wider.

    ``y``, if given, is what the layer's base layer made of ``x``: it serves unless other adapters stand below.
    """
    if y is None or isinstance(layer_below(layer), AdapterLayer):
        y, bias = base_module(layer)(x), base_module(layer).bias
    else:
        bias = layer.base_layer.bias
    return widened(y) if bias is None else widened(y) - widened(bias)


def layer_below(layer: AdapterLayer) -> nn.Module:
    """The layer that this adapter changes: another adapter's, or the base model's. A trained bias is this adapter's."""
    return layer.base_layer.base_layer if isinstance(layer.base_layer, TrainedBias) else layer.base_layer


def drawn_places(layer: DeltaLinear, name: str, key: str, count: int, seed: int | None) -> torch.Tensor:
    """Random places in an (out, in) matrix, as indices into its flat form: (count,).

    They are drawn as PEFT draws them: its files may hold the seed alone. On the CPU when the model is on the meta
    device. Without a seed the generator has its own, always the same.

    Raises:
        AdapterError: the matrix has fewer entries; ``key`` is the setting that asks for them.
    """
    view, weight = layer.view, stored_weight(layer)
    size = view.out_features * view.in_features
    if count > size:
        raise AdapterError(f"asks for {count} of the {size} numbers of {name}", key=key)
    generator = torch.Generator() if seed is None else torch.Generator().manual_seed(seed)
    places = torch.randperm(size, generator=generator)[:count].clone()
    return places if weight.is_meta else places.to(weight.device)


def scattered(values: torch.Tensor, places: torch.Tensor, view: Linear) -> torch.Tensor:
    """An (out, in) matrix that is zero but for ``values`` at ``places``."""
    flat = values.new_zeros(view.out_features * view.in_features)
    return flat.index_put((places.to(values.device),), values).view(view.out_features, view.in_features)
