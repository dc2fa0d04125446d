"""LoKr's two matrices have the sizes that PEFT gives them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lokr.layer import factorization
from torch import nn

from peftcli.core.targets import wrap
from peftcli.errors import AdapterError
from peftcli.methods.lokr import LoKrConfig
from peftcli.methods.lokr.layers import factors


@pytest.mark.parametrize("first", [-1, 1, 2, 3, 4, 5, 8, 16, 100])
def test_sides_are_taken_apart_as_peft_does(first: int) -> None:
    for side in (1, 2, 7, 12, 64, 96, 127, 128, 360, 576, 1536):
        assert factors(side, first) == factorization(side, first), side


def test_the_delta_is_the_kronecker_product() -> None:
    layer = wrap(nn.Linear(12, 20), "x", LoKrConfig(r=4, alpha=8))
    nn.init.normal_(layer.lokr_w1)
    torch.testing.assert_close(layer.delta(), 2 * torch.kron(layer.lokr_w1, layer.lokr_w2))


@pytest.mark.parametrize(("key", "value"), [("decompose_factor", 0), ("init_weights", "pissa"), ("r", 0)])
def test_settings_that_mean_nothing_are_named(key: str, value: object) -> None:
    with pytest.raises(AdapterError) as caught:
        LoKrConfig(**{key: value}).check()  # type: ignore[arg-type]
    assert caught.value.key == key


@pytest.mark.parametrize("settings", [{}, {"r": 1, "decompose_both": True}, {"decompose_factor": 3}])
def test_the_product_is_computed_without_making_it(settings: dict[str, Any]) -> None:
    layer: Any = wrap(nn.Linear(24, 36), "x", LoKrConfig(**settings))
    for parameter in layer.own_tensors().values():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 24)
    torch.testing.assert_close(layer.update(x), F.linear(x, layer.delta()), atol=1e-4, rtol=1e-4)
