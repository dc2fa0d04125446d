"""HRA's reflections."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftcli.core.targets import wrap
from peftcli.methods.hra import HRAConfig


def _layer(**settings: Any) -> Any:
    return wrap(nn.Linear(6, 4).requires_grad_(False), "x", HRAConfig(**settings))


def test_each_vector_reflects() -> None:
    layer, vector = _layer(r=1), torch.randn(6)
    layer.hra_u.data.copy_(vector[:, None])
    x = torch.randn(3, 6)
    turned = layer.rotated(x)
    torch.testing.assert_close(turned @ vector, -(x @ vector))
    across = x - turned
    torch.testing.assert_close(across, 2 * (x @ vector / (vector @ vector))[:, None] * vector)


def test_the_last_reflection_meets_the_input_first() -> None:
    layer = _layer(r=2, init_weights=False)
    first, second = (torch.eye(6) - 2 * torch.outer(u, u) / (u @ u) for u in layer.hra_u.detach().T)
    torch.testing.assert_close(layer.rotated(torch.eye(6)), (first @ second).T)


def test_an_odd_number_leaves_one_without_a_partner() -> None:
    layer = _layer(r=5)
    assert torch.equal(layer.hra_u[:, 0], layer.hra_u[:, 1])
    assert torch.equal(layer.hra_u[:, 2], layer.hra_u[:, 3])
    assert torch.linalg.det(layer.rotated(torch.eye(6))).item() < 0


def test_orthogonal_reflections_start_apart_and_are_orthogonal() -> None:
    layer = _layer(r=4, apply_GS=True)
    assert torch.linalg.matrix_rank(layer.hra_u) == 4
    rotation = layer.rotated(torch.eye(6))
    torch.testing.assert_close(rotation, rotation.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotation.trace(), torch.tensor(6.0 - 2 * 4), atol=1e-4, rtol=1e-4)
