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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

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

    def check(self) -> None:
        """Raises AdapterError for settings that mean nothing."""
        if self.method not in COMBINATIONS:
            raise AdapterError(f"no way to combine is called {self.method!r}; there are: {', '.join(COMBINATIONS)}")
        if self.r is not None and (self.r < 1 or not self.method.endswith("svd")):
            raise AdapterError("must be at least 1" if self.r < 1 else f"{self.method} chooses its own", key="r")
        drops = self.method.startswith(("ties", "dare", "magnitude"))
        if drops and (self.density is None or not 0 < self.density <= 1):
            raise AdapterError(f"{self.method} needs the share of values to keep, above 0, at most 1", key="density")
        if self.density is not None and not drops:
            raise AdapterError(f"{self.method} drops nothing", key="density")
        if self.majority_sign not in ("total", "frequency"):
            raise AdapterError(f"must be total or frequency, not {self.majority_sign!r}", key="majority_sign_method")

    def combined(self, parts: Sequence[tuple[float, Update]], place: str) -> Update:
        """One update of the weighted ``parts``, all of the module ``place``; its scaling is 1.

        Raises:
            AdapterError: the method needs one r for all.
        """
        r = self.r or max(update.r for _, update in parts)
        if self.method == "cat":
            return weighted_sum(parts)
        if self.method == "svd":
            return weighted_sum(parts).truncated(r)
        arithmetic = self._arithmetic(self.method.removesuffix("_svd"))
        if self.method.endswith("_svd"):
            deltas = [update.scaling * (update.left @ update.right) for _, update in parts]
            dense = arithmetic(torch.stack(deltas), [weight for weight, _ in parts])
            u, values, v = svd(dense)
            return Update(u[:, :r] * values[:r], v[:r])
        if len({update.r for _, update in parts}) > 1:
            sizes = ", ".join(str(update.r) for _, update in parts)
            raise AdapterError(f"{self.method} needs adapters of one r; {place} has {sizes}", hint="cat or svd do not")
        roots = [math.sqrt(abs(weight * update.scaling)) for weight, update in parts]
        signed = [math.copysign(root, weight) for root, (weight, _) in zip(roots, parts, strict=True)]
        right = arithmetic(torch.stack([update.right for _, update in parts]), signed)
        return Update(arithmetic(torch.stack([update.left for _, update in parts]), roots), right)

    def _arithmetic(self, name: str) -> Callable[[torch.Tensor, list[float]], torch.Tensor]:
        """Return the function that combines stacked tensors (n, ...) with a weight each."""
        small, all_of_it = self._drop_small, torch.Tensor.clone
        drops: dict[str, Callable[[torch.Tensor], torch.Tensor]]
        drops = {"linear": all_of_it, "ties": small, "magnitude_prune": small}
        drop = drops.get(name, self._drop_some)
        add = self._agreed_mean if name.endswith("ties") else _sum
        return lambda values, weights: add(drop(values), torch.tensor(weights, dtype=values.dtype))

    def _drop_small(self, values: torch.Tensor) -> torch.Tensor:
        """Of each tensor, the largest values."""
        flat = values.flatten(1)
        count = int((self.density or 0) * flat.shape[1])
        kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, flat.abs().topk(count).indices, True)
        return (flat * kept).view_as(values)

    def _drop_some(self, values: torch.Tensor) -> torch.Tensor:
        """Of each tensor, values at random, enlarged so that their expectation stays."""
        density = self.density or 0
        kept = [torch.bernoulli(torch.full_like(value, density), generator=self.generator) for value in values]
        return values * torch.stack(kept) / density

    def _agreed_mean(self, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The mean of the weighted values whose sign has the majority."""
        votes = values if self.majority_sign == "total" else values.sign()
        majority = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
        agree = values.sign() == majority
        return _sum(values * agree, weights) / agree.sum(0).clamp(min=1)


def _sum(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.tensordot(weights, values, dims=1)
