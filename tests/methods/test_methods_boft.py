"""BOFT's butterfly brings inputs together, and its scale leaves biases alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_tiny import randomise
from torch import nn

from peftcli.core.layer import AdapterLayer
from peftcli.core.targets import wrap
from peftcli.errors import AdapterError
from peftcli.methods.boft import BOFTConfig
from peftcli.methods.ia3 import IA3Config


def test_each_factor_doubles_what_comes_together() -> None:
    for factors, reach in ((1, 2), (2, 4), (3, 8)):
        config = BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=factors)
        layer: Any = wrap(nn.Linear(8, 3).requires_grad_(False), "x", config)
        randomise(layer)
        touched = layer.rotated(torch.eye(8)).abs() > 1e-6
        assert torch.equal(touched, torch.block_diag(*[torch.ones(reach, reach)] * (8 // reach)).bool())


def test_the_scale_leaves_the_bias_alone_whatever_is_below() -> None:
    base = nn.Linear(8, 3).requires_grad_(False)
    below: AdapterLayer = wrap(base, "x", IA3Config(feedforward_modules=[]))
    x, zeros = torch.randn(2, 8), torch.zeros(1, 8)
    for bias, inner in (("none", base), ("none", below), ("boft_only", base)):
        layer = wrap(inner, "x", BOFTConfig(bias=bias)).requires_grad_(True)
        base.requires_grad_(False)
        randomise(layer)
        merged = {**dict(base.named_parameters()), **layer.folded(dict(base.named_parameters()))}
        torch.testing.assert_close(torch.func.functional_call(base, merged, (x,)), layer(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer(zeros), layer.base_layer(zeros))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"boft_block_size": 5}, "5 does not divide 24, the inputs of x"),
        ({"boft_block_size": 0, "boft_block_num": 7}, "7 does not divide 24"),
        ({"boft_block_size": 3, "boft_n_butterfly_factor": 2}, "factors need blocks of an even side"),
        ({"boft_block_size": 4, "boft_n_butterfly_factor": 3}, "16 of its 24 inputs"),
    ],
)
def test_sizes_that_do_not_go_with_a_layer_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        wrap(nn.Linear(24, 3), "x", BOFTConfig(**settings))


@pytest.mark.parametrize("settings", [{"boft_block_num": 4}, {"boft_block_size": 0}])
def test_blocks_are_given_by_their_size_or_their_number(settings: dict[str, int]) -> None:
    with pytest.raises(AdapterError, match="give either boft_block_size or boft_block_num"):
        BOFTConfig(**settings).check()  # type: ignore[arg-type]
