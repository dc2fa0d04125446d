"""The update of a weight as a product of two thin matrices, and the size and likeness of updates.

Nothing here makes the product itself, which is as large as the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from peftcli.core.config import AdapterConfig
from peftcli.core.protocols import layers_of
from peftcli.errors import AdapterError


class UpdateUnknown(AdapterError):
    """The weight update cannot be computed from the adapter file alone."""


@dataclass(frozen=True)
class Update:
    """``scaling * left @ right``."""

    left: torch.Tensor
    """(out, r)"""
    right: torch.Tensor
    """(r, in)"""
    scaling: float = 1.0
    tensors: tuple[str, ...] = ()
    """Names of the tensors of the adapter file that say it."""

    @property
    def r(self) -> int:
        """Size of the bottleneck."""
        return self.right.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Size of the weight, (out, in)."""
        return self.left.shape[0], self.right.shape[1]

    def norm(self) -> float:
        """Frobenius norm of the update."""
        return float((_triangle(self._scaled_left()) @ self.right.double()).norm())

    def singular_values(self) -> torch.Tensor:
        """The update's singular values, from the largest: as many as r and the weight's sides allow, in float64.

        All are infinite where float64 does not hold the update.
        """
        product = _triangle(self._scaled_left()) @ _triangle(self.right.double().T).T
        if not product.isfinite().all():
            return product.new_full((min(product.shape),), torch.inf)
        return torch.linalg.svdvals(product)

    def dot(self, other: Update) -> float:
        """Sum of the products of the updates' elements."""
        lefts = self._scaled_left().T @ other._scaled_left()
        rights = self.right.double() @ other.right.double().T
        return float((lefts * rights).sum())

    def truncated(self, r: int) -> Update:
        """The update of bottleneck ``r``, or less where this one has less, that is nearest to this one.

        Raises:
            AdapterError: the update is too large for float64.
        """
        left, first = torch.linalg.qr(self._scaled_left())
        right, second = torch.linalg.qr(self.right.double().T)
        u, values, v = svd(first @ second.T)
        return Update(left @ (u[:, :r] * values[:r]), v[:r] @ right.T)

    def _scaled_left(self) -> torch.Tensor:
        return self.scaling * self.left.double()


@runtime_checkable
class HasUpdates(Protocol):
    """A method whose layers module computes what it adds to the base weights from the adapter file alone."""

    def updates(self, config: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, Update]:
        """Return the update of each adapted weight: see ``find_updates``."""


def find_updates(config: AdapterConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, Update]:
    """Return what the tensors of an adapter file add to each adapted weight, by the path of its module.

    Raises:
        UpdateUnknown: the base model is needed to compute it.
        AdapterError: the tensors do not fit the config.
    """
    layers = layers_of(config)
    if not isinstance(layers, HasUpdates):
        raise UpdateUnknown(f"what {config.peft_type} changes cannot be told from its file without the base model")
    return layers.updates(config, tensors)


def weighted_sum(parts: Sequence[tuple[float, Update]]) -> Update:
    """The sum of updates times a weight each, exactly: its r is the sum of theirs."""
    lefts = [weight * update.scaling * update.left for weight, update in parts]
    return Update(torch.cat(lefts, dim=1), torch.cat([update.right for _, update in parts]))


def distance(one: Update, other: Update) -> float:
    """Frobenius norm of the difference of two updates."""
    return weighted_sum([(1.0, _double(one)), (-1.0, _double(other))]).norm()


def svd(matrix: torch.Tensor, driver: str | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, the singular values from the largest, and V^T of a matrix, each only as large as these need.

    Raises:
        AdapterError: an element is not finite, or ``driver`` is not for this device.
    """
    if not matrix.isfinite().all():
        raise AdapterError("the combined values are not finite", hint="take smaller weights, or a larger density")
    if driver is not None and not matrix.is_cuda:
        raise AdapterError("is for adapters on an NVIDIA GPU", key="svd_driver")
    u, values, v = torch.linalg.svd(matrix, full_matrices=False, driver=driver)
    return u, values, v


def effective_r(values: torch.Tensor) -> float:
    """Return how many directions an update with these singular values uses: the exponential of their entropy.

    From 1, where one direction is all of it, to their number, where all count alike (Roy and Vetterli, "The effective
    rank"); 0 where there is no update.
    """
    if not values.any():
        return 0.0
    largest = values.max()
    share = values / largest  # the sum of very large ones would be infinite
    share = share / share.sum()
    return float(torch.special.entr(share).sum().exp())


def _double(update: Update) -> Update:
    return Update(update.left.double(), update.right.double(), update.scaling)


def _triangle(matrix: torch.Tensor) -> torch.Tensor:
    """R of the QR decomposition: as long as ``matrix`` in every direction of its rows' space."""
    return torch.linalg.qr(matrix, mode="r").R
