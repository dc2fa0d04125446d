"""C3A: circulant blocks, multiplied by way of the Fourier transform."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models_tiny import tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.errors import AdapterError
from peftcli.methods.c3a import C3AConfig
from peftcli.methods.c3a.layers import C3ALinear


@pytest.mark.parametrize("base", [nn.Linear(6, 9), Conv1D(9, 6)])
@pytest.mark.parametrize("block", [1, 3])
def test_each_block_is_its_kernel_shifted_by_one_a_row(base: nn.Module, block: int) -> None:
    layer = C3ALinear(base, "x", C3AConfig(block_size=block)).eval()
    kernel = layer.c3a_kernel
    assert kernel.shape == (9 // block, 6 // block, block)
    expected = torch.zeros(9, 6)
    for o in range(9):
        for i in range(6):
            expected[o, i] = kernel[o // block, i // block, (i - o) % block] / 6
    x = torch.randn(2, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(layer.delta(), expected)
        torch.testing.assert_close(layer(x), base(x) + x @ expected.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("start", "bound"), [("xavier_uniform", 6 / 500), (False, 6 / 500), ("kaiming_uniform", 1 / 300)]
)
def test_how_kernels_start(start: Any, bound: float) -> None:
    kernel = C3ALinear(nn.Linear(300, 200), "x", C3AConfig(block_size=10, init_weights=start)).c3a_kernel
    assert 0.98 * math.sqrt(bound) < kernel.abs().max() <= math.sqrt(bound)


def test_true_starts_from_no_update_and_gaussian_from_a_normal_one() -> None:
    zero, normal = (
        C3ALinear(nn.Linear(300, 200), "x", C3AConfig(block_size=10, init_weights=start)).c3a_kernel  # type: ignore[arg-type]
        for start in (True, "gaussian")
    )
    assert not zero.any()
    assert normal.std().item() == pytest.approx(1.0, rel=0.05)


def test_layers_may_have_blocks_of_their_own() -> None:
    model = tiny("llama")
    inject(model, C3AConfig(block_size=8, block_size_pattern={"v_proj": 4}))
    assert [layer.c3a_kernel.shape[-1] for layer in adapter_layers(model).values()] == [8, 4, 8, 4]


def test_a_block_that_does_not_divide_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"256 does not divide 32, a side of .*q_proj") as caught:
        inject(tiny("llama"), C3AConfig())
    assert caught.value.key == "block_size"
