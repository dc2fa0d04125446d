"""RoAd turns pairs of outputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models_tiny import randomise
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftcli.core.targets import wrap
from peftcli.errors import AdapterError
from peftcli.methods.road import RoadConfig


def _layer(base: nn.Module, **settings: Any) -> Any:
    return wrap(base.requires_grad_(False), "x", RoadConfig(**settings))


def test_a_pair_is_turned_by_its_angle_and_scaled() -> None:
    base = nn.Linear(4, 8)
    layer = _layer(base, group_size=4)
    layer.road_theta.data[1], layer.road_alpha.data[1] = math.pi / 2, 2.0  # outputs 1 and 3 of the first group
    x = torch.randn(3, 4)
    y = base(x)
    expected = y.clone()
    expected[:, 1], expected[:, 3] = -2 * y[:, 3], 2 * y[:, 1]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize(("variant", "size"), [("road_1", 4), ("road_2", 8), ("road_4", 16)])
@pytest.mark.parametrize("base", [nn.Linear(4, 8), nn.Linear(4, 8, bias=False), Conv1D(8, 4)])
def test_merged_is_the_same_for_every_variant(variant: str, size: int, base: nn.Module) -> None:
    layer, x = _layer(base, variant=variant, group_size=4), torch.randn(3, 4)
    torch.testing.assert_close(layer(x), base(x))
    assert layer.road_theta.shape == layer.road_alpha.shape == (size,)
    randomise(layer)
    merged = layer.merged_tensors(dict(base.named_parameters()))
    torch.testing.assert_close(torch.func.functional_call(base, merged, (x,)), layer(x))


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(AdapterError, match="6 does not divide 8, the outputs of x"):
        _layer(nn.Linear(4, 8), group_size=6)
    for settings in ({"group_size": 3}, {"group_size": 0}, {"variant": "road_3"}):
        with pytest.raises(AdapterError, match="must be"):
            RoadConfig(**settings).check()
