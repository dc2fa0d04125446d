"""OSF trains the weaker directions and leaves the stronger alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from peftcli.core.targets import wrap
from peftcli.errors import AdapterError
from peftcli.methods.osf import OSFConfig

BASES = [nn.Linear(12, 8), nn.Linear(8, 12), nn.Linear(8, 8)]


def _layer(base: nn.Module, **settings: Any) -> Any:
    return wrap(base.requires_grad_(False), "layers.3.x", OSFConfig(**settings))


@pytest.mark.parametrize("base", BASES)
def test_training_starts_from_the_base_layer(base: nn.Linear) -> None:
    layer, x = _layer(base), torch.randn(5, base.in_features)
    torch.testing.assert_close(layer(x), base(x))
    assert {name: tuple(value.shape) for name, value in layer.own_tensors().items()} == {
        "osf_svd_params.U_low": (base.out_features, 4),
        "osf_svd_params.S_low": (4,),
        "osf_svd_params.V_low": (4, base.in_features),
    }


@pytest.mark.parametrize("base", BASES)
def test_steps_have_nothing_along_the_stronger_directions(base: nn.Linear) -> None:
    layer, x = _layer(base, effective_rank=3), torch.randn(50, base.in_features)
    u, _, v = torch.linalg.svd(base.weight, full_matrices=False)
    optimizer = torch.optim.SGD(layer.own_tensors().values(), lr=0.5)
    (layer(x) - torch.randn(50, base.out_features)).square().mean().backward()
    optimizer.step()
    moved = layer.delta_of(base.weight)
    assert moved.norm() > 1e-2
    assert (u[:, :3].T @ moved).norm() < 1e-4 * moved.norm()
    assert (moved @ v[:3].T).norm() < 1e-4 * moved.norm()


@pytest.mark.parametrize("base", BASES)
def test_merged_is_the_same(base: nn.Linear) -> None:
    layer, x = _layer(base, init_weights=False), torch.randn(5, base.in_features)
    merged = layer.folded(dict(base.named_parameters()))
    with torch.no_grad():
        torch.testing.assert_close(torch.func.functional_call(base, merged, (x,)), layer(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, 4),
        ({"effective_rank": 3}, 3),
        ({"effective_rank": 1}, 1),
        ({"effective_rank": 0.9}, 7),
        ({"rank_pattern": {"layers.3": 2}}, 2),
        ({"rank_pattern": {"layers.4": 2, "3": 0.25, "x": 5}}, 2),
    ],
)
def test_how_many_directions_stay(settings: dict[str, Any], kept: int) -> None:
    assert _layer(nn.Linear(12, 8), **settings).kept == kept


@pytest.mark.parametrize("rank", [8, 1.0, 0.01])
def test_all_directions_or_none_are_refused(rank: float) -> None:
    with pytest.raises(AdapterError, match="of the 8 directions of layers"):
        _layer(nn.Linear(12, 8), effective_rank=rank)
    with pytest.raises(AdapterError, match="must be above 0"):
        OSFConfig(rank_pattern={"x": 0}).check()
