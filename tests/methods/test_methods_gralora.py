"""GraLoRA: a LoRA for each block of a weight."""

from __future__ import annotations

import math

import pytest
import torch
from models_tiny import tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftcli.core.inject import inject
from peftcli.errors import AdapterError
from peftcli.methods.gralora import GraloraConfig
from peftcli.methods.gralora.layers import GraloraLinear


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("base", [nn.Linear(6, 9), Conv1D(9, 6)])
@pytest.mark.parametrize("hybrid_r", [0, 2])
@pytest.mark.parametrize("shape", [(2, 6), (2, 4, 6), (1, 2, 3, 6)])
def test_each_block_has_a_lora(base: nn.Module, hybrid_r: int, shape: tuple[int, ...]) -> None:
    k, r = 3, 6
    layer = GraloraLinear(base, "x", GraloraConfig(r=r, gralora_k=k, alpha=12, hybrid_r=hybrid_r)).eval()
    with torch.no_grad():
        for parameter in layer.own_tensors().values():
            parameter.normal_()
    expected = torch.zeros(9, 6)
    for m in range(k):
        for n in range(k):
            a = layer.gralora_A[n][:, 2 * m : 2 * m + 2]  # (in / k, r / k)
            b = layer.gralora_B[m][2 * n : 2 * n + 2]  # (r / k, out / k)
            expected[3 * m : 3 * m + 3, 2 * n : 2 * n + 2] = (a @ b).T
    if hybrid_r:
        expected = expected + layer.gralora_B_general.weight @ layer.gralora_A_general.weight
    expected = 12 / (r + hybrid_r) * expected
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(layer.delta(), expected)
        torch.testing.assert_close(layer(x), base(x) + x @ expected.T, atol=1e-4, rtol=1e-4)


def test_the_parameters_are_loras_and_the_rank_is_k_times_as_high() -> None:
    layer = GraloraLinear(nn.Linear(24, 24), "x", GraloraConfig(r=4, gralora_k=4))
    nn.init.normal_(layer.gralora_B)
    assert sum(value.numel() for value in layer.own_tensors().values()) == 4 * (24 + 24)
    assert torch.linalg.matrix_rank(layer.delta()) == 16


def test_how_a_and_b_start() -> None:
    layer = GraloraLinear(nn.Linear(400, 300), "x", GraloraConfig(hybrid_r=8))
    assert not layer.delta().any()
    assert 0.99 / math.sqrt(200) < layer.gralora_A.abs().max() <= 1 / math.sqrt(200)
    free = GraloraLinear(nn.Linear(400, 300), "x", GraloraConfig(init_weights=False))
    assert 0.99 / math.sqrt(32) < free.gralora_B.abs().max() <= 1 / math.sqrt(32)


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(AdapterError, match="3 does not divide r, 32") as caught:
        GraloraConfig(gralora_k=3).check()
    assert caught.value.key == "gralora_k"
    with pytest.raises(AdapterError, match=r"3 does not divide 32, a side of .*q_proj"):
        inject(tiny("llama"), GraloraConfig(r=3, gralora_k=3))
