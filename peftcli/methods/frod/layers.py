"""The layer of FRoD (https://arxiv.org/abs/2512.23485), and the bases that layers share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.inject import on_unload
from peftcli.core.layer import AdapterLayer, base_module, version_of
from peftcli.core.linear import dense_weight
from peftcli.core.quantised import is_quantised
from peftcli.errors import AdapterError
from peftcli.methods._delta import (
    WeightDeltaLinear,
    base_product,
    factory_kwargs,
    in_base_dtype,
    layer_below,
    stored_weight,
)
from peftcli.methods.frod import FrodConfig


class Places(nn.Module):
    """Where the numbers of ``S`` stand: ``indices: (2, count)``, and the size of ``S``.

    Buffers, since FSDP takes no model with parameters of another dtype. In a module of their own, since layers that
    share a module still share its tensors when the model was moved.
    """

    indices: torch.Tensor

    def __init__(self, indices: torch.Tensor, size: torch.Tensor):
        super().__init__()
        self.register_buffer("indices", indices)
        self.register_buffer("size", size)


class FrodLinear(WeightDeltaLinear):
    """``W + delta = U (diag(l) + S) V^T`` with ``U: (out, in)``, ``V: (in, in)``; ``U diag(l) V^T`` is ``W`` at first.

    ``l: (in,)`` and the few numbers of ``S: (in, in)`` that are not zero train. ``V`` and the places in ``S`` belong
    to all layers of a kind. ``U`` comes from ``V`` and ``W``; the file does not hold it.
    """

    fixed = ("frod_V", "frod_s.indices", "frod_s.size")
    frod_V: nn.Parameter
    frod_s: Places
    frod_U: torch.Tensor

    def __init__(self, module: nn.Module, name: str, config: FrodConfig):
        super().__init__(module, name, "FRoD", config.bias, config.frod_dropout)
        self.kind = kind_of(name)
        self.saves_fixed = config.save_projection
        self.offloads = config.runtime_offload_base_weight
        if self.offloads and is_quantised(base_module(self)):
            key = "runtime_offload_base_weight"
            raise AdapterError(f"the weight of {name} is quantised, and stays on its device", key=key)
        inputs, like = self.view.in_features, factory_kwargs(self)
        self.frod_lambda_l = nn.Parameter(torch.ones(inputs, **like))
        self.frod_lambda_s_values = nn.Parameter(torch.zeros(num_places(inputs, config.sparse_rate), **like))
        self.register_buffer("frod_U", None, persistent=False)
        self.seen: int | None = None
        """The version of ``V`` that ``U`` belongs to."""

    def start(self, basis: nn.Parameter, places: Places, config: FrodConfig) -> None:
        """Take what layers of the kind share, and give the trained numbers their first values."""
        self.frod_V, self.frod_s = basis, places.train(self.training)
        with torch.no_grad():
            if config.inference_mode and config.save_projection:  # V is the identity until a file has filled it
                lengths = dense_weight(self).norm(dim=0)
            else:
                self.frod_U, lengths = decompose(self.frod_V, dense_weight(self))
                self.seen = version_of(self.frod_V)
            self.frod_lambda_l.copy_(lengths)
            if not config.init_weights:
                self.frod_lambda_l.add_(torch.randn_like(lengths), alpha=0.1)
                self.frod_lambda_s_values.normal_(std=0.1)

    def file_name(self, path: str, tensor: str) -> str:
        if tensor in self.fixed:
            return f"base_model.{tensor.replace('.', '_')}.{self.kind}"
        return super().file_name(path, tensor)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.enabled:
            self.base_weight_to(x.device)
            return self.base_layer(x, *args, **kwargs)
        dropped = self.dropout(x)
        z = dropped.to(self.frod_lambda_l.dtype) @ self.frod_V
        left = self._left()
        turned = (self.frod_lambda_l * z + self._sparse_product(z)).to(left.dtype)
        if dropped is x and not isinstance(layer_below(self), AdapterLayer):  # U has W's part
            self.base_weight_to(torch.device("cpu"))
            bias = self.base_layer.bias
            y = F.linear(turned, left, bias if bias is None else bias.to(left.dtype))
            return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)
        new = F.linear(turned, left)
        self.base_weight_to(x.device)
        y = self.base_layer(x, *args, **kwargs)
        old = base_product(self, dropped, y if dropped is x else None)
        return y + (new - old.to(new.dtype)).to(y.dtype)

    def base_weight_to(self, device: torch.device) -> None:
        """Move the base weight, where it may be elsewhere: with ``runtime_offload_base_weight``."""
        if self.offloads and not (weight := base_module(self).weight).is_meta:
            weight.data = weight.data.to(device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FrodLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.base_weight_to(torch.device("cpu"))
        return self

    def folded(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return super().folded({name: value.to(self.frod_V.device) for name, value in base.items()})

    def delta_of(self, weight: torch.Tensor) -> torch.Tensor:
        dense = self.view.as_stored(weight)
        left, _ = decompose(self.frod_V, dense)
        middle = self._sparse().to_dense() + self.frod_lambda_l.diag()
        return self.view.as_stored(left.to(dense) @ middle @ self.frod_V.T - dense)

    def _sparse_product(self, z: torch.Tensor) -> torch.Tensor:
        """``S z``."""
        sparse = self._sparse()
        with torch.autocast(z.device.type, enabled=False):  # there are no sparse products in half precision
            return torch.sparse.mm(sparse, z.to(sparse.dtype).flatten(0, -2).T).T.reshape(z.shape)

    def _sparse(self) -> torch.Tensor:
        """``S``, as a sparse tensor."""
        size = len(self.frod_lambda_l)
        indices, values = self.frod_s.indices, self.frod_lambda_s_values
        return torch.sparse_coo_tensor(indices, values, (size, size), check_invariants=False).coalesce()

    def _left(self) -> torch.Tensor:
        """``U``, found anew when ``V`` was filled from a file."""
        if self.frod_U is None or version_of(self.frod_V) != self.seen:
            with torch.inference_mode(False), torch.no_grad():  # it serves in training later
                self.frod_U = decompose(self.frod_V, dense_weight(self))[0].to(self.frod_V.device)
            self.seen = version_of(self.frod_V)
        return self.frod_U


def attach(model: nn.Module, config: FrodConfig, layers: Mapping[str, AdapterLayer]) -> None:
    """Find ``V`` and draw the places in ``S`` for each kind of layer, as PEFT does, whose files may not hold them."""
    given: dict[str, Any] = dict(layers)
    chosen, inputs = dict[str, dict[int, Any]](), dict[str, int]()
    for number, (name, layer) in enumerate(given.items()):
        kind, width = kind_of(name), layer.view.in_features
        if inputs.setdefault(kind, width) != width:  # they cannot share V
            raise AdapterError(f"modules like {name} have {width} inputs and {inputs[kind]}", key="target_modules")
        # of several at one place, as in encoder and decoder, the last one counts, as in PEFT
        chosen.setdefault(kind, {})[_place(name, number)] = layer
    generator = torch.Generator().manual_seed(config.projection_prng_key)
    for kind, found in sorted(chosen.items()):
        group = [layer for name, layer in given.items() if kind_of(name) == kind]
        if config.inference_mode and config.save_projection:  # a file has it, and finding it takes long
            basis = torch.eye(inputs[kind])
        else:
            weights = [dense_weight(layer) for _, layer in sorted(found.items())]
            basis = shared_basis(weights, config.regularization_alpha)
        places = _drawn_places(len(basis), config.sparse_rate, generator)
        basis = in_base_dtype(basis, stored_weight(group[0])).to(**factory_kwargs(group[0])).contiguous()
        shared = Places(places.to(basis.device), torch.tensor(basis.shape, device=basis.device))
        frozen = nn.Parameter(basis, requires_grad=False)
        for layer in group:
            layer.start(frozen, shared, config)
    if config.runtime_offload_base_weight:
        on_unload(model, functools.partial(_bring_back, list(layers.values())))


def _bring_back(layers: Iterable[Any]) -> None:
    """Move the layers' base weights to where the adapter is."""
    for layer in layers:
        layer.base_weight_to(layer.frod_V.device)


def describe(config: FrodConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the config for a file with these tensors.

    Raises:
        AdapterError: a basis is still the identity, which no file has filled. PEFT would find another one.
    """
    bases = [value for name, value in tensors.items() if ".frod_V." in name and len(value) > 1]
    if any(torch.equal(value, torch.eye(len(value)).to(value)) for value in bases):
        raise AdapterError(
            "the adapter was made for a file to fill its basis, and none has",
            key="inference_mode",
            hint="make it with inference_mode=False",
        )
    return config.file_dict()


def decompose(basis: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``U`` and ``l`` with ``U diag(l) V^T = W`` and columns of length one in ``U``, for a weight (out, in)."""
    if basis.is_meta or weight.is_meta:
        return torch.empty_like(weight, device="meta"), weight.new_empty(weight.shape[1], device="meta")
    v, w = basis.detach().double().cpu(), weight.double().cpu()
    try:
        scaled = torch.linalg.solve(v, w.T).T
    except RuntimeError:  # singular: kinds of layers whose weights do not span their inputs
        scaled = w @ torch.linalg.pinv(v, rtol=1e-6).T
    lengths = scaled.norm(dim=0)
    left = torch.where(lengths > 1e-12, scaled / lengths, 0.0)
    return left.to(weight.device, weight.dtype), lengths.to(weight.device, weight.dtype)


def shared_basis(weights: list[torch.Tensor], ridge: float) -> torch.Tensor:
    """``V`` for weights (out, in) that share their inputs: (in, in).

    From the joint decomposition of the stacked weights, in float32 on the CPU and step by step as in PEFT: a column's
    sign is free, and adapters of both have to mean the same.
    """
    inputs = weights[0].shape[1]
    if weights[0].is_meta:
        return weights[0].new_empty(inputs, inputs)
    stacked = torch.cat([weight.float().cpu() for weight in weights])
    if len(stacked) < inputs:
        return torch.linalg.svd(stacked, full_matrices=True).Vh.T
    q, r = torch.linalg.qr(stacked)
    total, identity = torch.zeros_like(r), torch.eye(inputs)
    for part in q.split([len(weight) for weight in weights]):
        total += torch.linalg.inv(part.T @ part + ridge * identity)
    return r.T @ torch.linalg.eigh(total / len(weights)).eigenvectors


def num_places(inputs: int, rate: float) -> int:
    """Return how many numbers of ``S`` train."""
    count = min(int(inputs * inputs * rate), inputs * inputs - inputs)
    return max(1, count) if rate > 0 and inputs > 1 else count


def kind_of(name: str) -> str:
    """Return a module's name inside its block: the last two parts, or one if a number comes before it."""
    *before, last = name.split(".")
    if not before or before[-1].isdigit():
        return last
    if last == "dense" and before[-2:] == ["attention", "output"]:  # in BERT, besides the MLP's output.dense
        return "attention_output"
    return f"{before[-1]}_{last}"


def _place(name: str, otherwise: int) -> int:
    """Index of the transformer layer that a module belongs to: the number after ``layers``, or the first one."""
    parts = name.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in [*after, *parts] if part.isdigit()), otherwise)


def _drawn_places(inputs: int, rate: float, generator: torch.Generator) -> torch.Tensor:
    """Random places off the diagonal of an (in, in) matrix, as rows and columns: (2, count)."""
    drawn = torch.randperm(inputs * inputs - inputs, generator=generator)[: num_places(inputs, rate)]
    rows, columns = drawn // max(inputs - 1, 1), drawn % max(inputs - 1, 1)
    return torch.stack([rows, columns + (columns >= rows)])


wrap = FrodLinear
