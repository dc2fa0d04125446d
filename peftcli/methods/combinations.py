"""Combine updates into one.

``cat`` is the weighted sum, exactly, at the sum of the r's. ``svd`` is the nearest to it of a smaller r. The others act
on the factors A and B by themselves, or as ``..._svd`` on the updates, which are dense then and are brought back to
factors by ``svd``:

- ``linear`` adds A to A and B to B. The product of sums is no sum of products: a rough approximation.
- ``ties`` drops small values, lets the signs vote and averages those that agree (https://arxiv.org/abs/2306.01708).
- ``dare_linear`` and ``dare_ties`` drop values at random and enlarge the rest (https://arxiv.org/abs/2311.03099).
- ``magnitude_prune`` drops small values and adds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from peftcli.core.config import AdapterConfig
from peftcli.core.protocols import layers_of
from peftcli.errors import AdapterError
from peftcli.methods.updates import Update, svd, weighted_sum

COMBINATIONS = (
    "cat",
    "svd",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)


@dataclass(frozen=True)
class Combination:
    """How updates are combined, under PEFT's names."""

    method: str = "cat"
    """One of COMBINATIONS."""
    r: int | None = None
    """Of ``svd`` and ``..._svd``: the r of the result. None: the largest of those that are combined."""
    density: float | None = None
    """The share of values to keep, for the methods that drop some."""
    majority_sign: str = "total"
    """How signs vote in TIES: by the sum of the values (total), or one vote a value (frequency)."""
    generator: torch.Generator | None = None
    """What DARE draws from. None: PyTorch's own."""
    clamp: float | None = None
    """Of ``svd`` and ``..._svd``: the quantile of the values of the factors that limits their size. None: no limit."""
    driver: str | None = None
    """Of the same: cuSOLVER's algorithm, for adapters on a GPU: gesvd, gesvdj or gesvda. None: PyTorch's choice."""

    def check(self) -> None:
        """Raise AdapterError for settings that mean nothing."""
        if self.method not in COMBINATIONS:
            raise AdapterError(f"no way to combine is called {self.method!r}; there are: {', '.join(COMBINATIONS)}")
        if self.r is not None and (self.r < 1 or not self.method.endswith("svd")):
            raise AdapterError("must be at least 1" if self.r < 1 else f"{self.method} chooses its own", key="r")
        for key, value in (("svd_clamp", self.clamp), ("svd_driver", self.driver)):
            if value is not None and not self.method.endswith("svd"):
                raise AdapterError(f"{self.method} decomposes nothing", key=key)
        if self.clamp is not None and not 0 < self.clamp <= 1:
            raise AdapterError(f"must be above 0 and at most 1, not {self.clamp}", key="svd_clamp")
        drops = self.method.startswith(("ties", "dare", "magnitude"))
        if drops and (self.density is None or not 0 < self.density <= 1):
            raise AdapterError(f"{self.method} needs the share of values to keep, above 0, at most 1", key="density")
        if self.density is not None and not drops:
            raise AdapterError(f"{self.method} drops nothing", key="density")
        if self.majority_sign not in ("total", "frequency"):
            raise AdapterError(f"must be total or frequency, not {self.majority_sign!r}", key="majority_sign_method")

    def combined(self, parts: Sequence[tuple[float, Update]], place: str, largest_r: int) -> Update:
        """One update of the weighted ``parts``, all of the module ``place``; its scaling is 1.

        ``largest_r`` is that of all modules of all adapters.

        Raises:
            AdapterError: the method needs one r for all.
        """
        r = self.r or largest_r
        if self.method == "cat":
            return weighted_sum(parts)
        if self.method == "svd" and self.clamp is None and self.driver is None:
            return weighted_sum(parts).truncated(r)
        if self.method.endswith("svd"):
            deltas = [update.scaling * (update.left @ update.right) for _, update in parts]
            dense = self.merged(torch.stack(deltas), [weight for weight, _ in parts])
            u, values, v = svd(dense, self.driver)
            return self._clamped(u[:, :r] * values[:r], v[:r])
        if len({update.r for _, update in parts}) > 1:
            sizes = ", ".join(str(update.r) for _, update in parts)
            raise AdapterError(f"{self.method} needs adapters of one r; {place} has {sizes}", hint="cat or svd do not")
        roots = [math.sqrt(abs(weight * update.scaling)) for weight, update in parts]
        signed = [math.copysign(root, weight) for root, (weight, _) in zip(roots, parts, strict=True)]
        right = self.merged(torch.stack([update.right for _, update in parts]), signed)
        return Update(self.merged(torch.stack([update.left for _, update in parts]), roots), right)

    def merged(self, values: torch.Tensor, weights: list[float]) -> torch.Tensor:
        """One tensor of stacked ones (n, ...) with a weight each. Of ``cat`` and ``svd`` the sum."""
        name = self.method.removesuffix("_svd")
        if name in ("ties", "magnitude_prune"):
            values = self._drop_small(values)
        elif name.startswith("dare"):
            values = self._drop_some(values)
        add = self._agreed_mean if name.endswith("ties") else _sum
        return add(values, torch.tensor(weights, dtype=values.dtype, device=values.device))

    def _clamped(self, left: torch.Tensor, right: torch.Tensor) -> Update:
        if self.clamp is None:
            return Update(left, right)
        values = torch.cat([left.flatten(), right.flatten()]).sort().values
        place = self.clamp * (len(values) - 1)  # as torch.quantile, which takes no more than 16 million values
        limit = values[math.floor(place)].lerp(values[math.ceil(place)], place % 1).abs()
        return Update(left.clamp(-limit, limit), right.clamp(-limit, limit))

    def _drop_small(self, values: torch.Tensor) -> torch.Tensor:
        """Keep the largest values of each tensor."""
        flat = values.flatten(1)
        count = int((self.density or 0) * flat.shape[1])
        kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, flat.abs().topk(count).indices, True)
        return (flat * kept).view_as(values)

    def _drop_some(self, values: torch.Tensor) -> torch.Tensor:
        """Drop values of each tensor at random, and enlarge the others, so that the expectation stays."""
        density = self.density or 0
        share = torch.full(values.shape, density, dtype=values.dtype)  # drawn on the CPU: the same on every device
        kept = [torch.bernoulli(each, generator=self.generator) for each in share]
        return values * torch.stack(kept).to(values.device) / density

    def _agreed_mean(self, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The mean of the weighted values whose sign has the majority."""
        agree = majority_mask(values, self.majority_sign)
        return _sum(values * agree, weights) / agree.sum(0).clamp(min=1)


def majority_mask(values: torch.Tensor, majority_sign: str) -> torch.Tensor:
    """Return which of stacked values (n, ...) have the sign of the majority: see ``Combination.majority_sign``."""
    votes = values if majority_sign == "total" else values.sign()
    return values.sign() == torch.where(votes.sum(0) >= 0, 1.0, -1.0)


def _sum(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.tensordot(weights, values, dims=1)


@dataclass(frozen=True)
class Adapter:
    """An adapter to combine."""

    name: str
    """Its name in messages."""
    config: AdapterConfig
    tensors: Mapping[str, torch.Tensor]
    """By the names of the adapter file."""


@dataclass(frozen=True)
class Combined:
    """The combined adapter and its errors."""

    config: Any
    """Of the method of the adapters."""
    tensors: dict[str, torch.Tensor]
    errors: dict[str, float]
    """Of each adapted module: distance of its update from the weighted sum, over the norm of that sum."""
    error: float
    """The same over all modules."""


@runtime_checkable
class Combines(Protocol):
    """A method whose adapters can be combined."""

    def combine(self, adapters: Sequence[Adapter], weights: Sequence[float], how: Combination) -> Combined:
        """Combine adapters of the method into one, each times its weight: see ``combine``."""


def combine(adapters: Sequence[Adapter], weights: Sequence[float], how: Combination) -> Combined:
    """Combine adapters of one method into one, each times its weight.

    Raises:
        AdapterError: the adapters are not of one base model and method, or cannot be combined like that.
    """
    if not adapters:
        raise AdapterError("names no adapter", key="adapters")
    layers = layers_of(adapters[0].config)
    if not isinstance(layers, Combines):
        raise AdapterError(f"{adapters[0].name} is {adapters[0].config.peft_type}, which cannot be combined")
    return layers.combine(adapters, weights, how)


def check_alike(adapters: Sequence[Adapter], weights: Sequence[float], same: Sequence[str]) -> None:
    """Raise AdapterError for adapters of different base models, methods or settings ``same``, and for wrong weights."""
    if len(adapters) != len(weights) or not adapters:
        raise AdapterError(f"{len(weights)} weights for {len(adapters)} adapters", key="weights")
    if not all(math.isfinite(weight) for weight in weights):
        raise AdapterError("must be finite numbers", key="weights")
    for key in ("base_model_name_or_path", "revision", "task_type", "peft_type"):
        values = {value: adapter.name for adapter in adapters if (value := getattr(adapter.config, key))}
        if len(values) > 1:
            said = ", ".join(f"{name} is for {value}" for value, name in values.items())
            raise AdapterError(f"the adapters do not belong together: {said}", key=key)
    for key in same:
        if len({repr(getattr(adapter.config, key)) for adapter in adapters}) > 1:
            said = ", ".join(f"{adapter.name} has {getattr(adapter.config, key)!r}" for adapter in adapters)
            raise AdapterError(f"must be the same to be combined: {said}", key=key)


def replaced(adapters: Sequence[Adapter], weights: Sequence[float], known: Collection[str]) -> dict[str, torch.Tensor]:
    """Return the weighted means of tensors that replace the base model's, and base weights that files carry along.

    The method combines the tensors ``known`` itself.
    """
    found = {}
    for name in sorted({name for adapter in adapters for name in adapter.tensors}.difference(known)):
        values = [adapter.tensors.get(name) for adapter in adapters]
        there = [value for value in values if value is not None]
        if name.endswith(".base_layer.weight"):
            if any(value.shape != there[0].shape or not torch.equal(value, there[0]) for value in there):
                raise AdapterError(f"the adapters are for base models with another {name}")
            found[name] = there[0]
        elif len(there) < len(adapters):
            without = adapters[[value is None for value in values].index(True)].name
            raise AdapterError(f"{without} does not hold {name}, which another of the adapters replaces")
        elif len({value.shape for value in there}) > 1:
            said = " and ".join(" x ".join(map(str, value.shape)) for value in there)
            raise AdapterError(f"{name} is of other sizes in other adapters: {said}")
        elif not math.isclose(sum(weights), 1.0, rel_tol=1e-9):
            raise AdapterError(
                f"{name} replaces values of the base model; such values can only be averaged, and the weights add up "
                f"to {sum(weights):g}, not 1",
                key="weights",
            )
        else:
            wide = [value.to(torch.promote_types(value.dtype, torch.float32)) for value in there]
            found[name] = torch.stack([w * value for w, value in zip(weights, wide, strict=True)]).sum(0)
    return found
