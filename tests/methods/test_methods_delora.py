"""DeLoRA: directions and strength apart."""

from __future__ import annotations

import pytest
import torch
from models_tiny import tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.errors import AdapterError
from peftcli.methods.delora import DeloraConfig
from peftcli.methods.delora.layers import DeloraLinear


def _filled(base: nn.Module, **settings: object) -> DeloraLinear:
    layer = DeloraLinear(base, "x", DeloraConfig(**settings)).eval()  # type: ignore[arg-type]
    nn.init.normal_(layer.delora_B)
    return layer


@pytest.mark.parametrize("base", [nn.Linear(5, 7), Conv1D(7, 5)])
def test_the_update_is_a_sum_of_unit_directions(base: nn.Module) -> None:
    layer = _filled(base, r=3, delora_lambda=6)
    weight = base.weight.T if isinstance(base, Conv1D) else base.weight
    expected = torch.zeros(7, 5)
    for i in range(3):
        a, b = layer.delora_A[i], layer.delora_B[:, i]
        expected += 6 / 3 * torch.outer(b / b.norm(), a / a.norm())
    expected *= weight.norm(dim=0)
    x = torch.randn(2, 4, 5)
    with torch.no_grad():
        torch.testing.assert_close(layer.delta(), expected)
        torch.testing.assert_close(layer(x), base(x) + x @ expected.T, atol=1e-5, rtol=1e-5)


def test_lengths_do_not_count_and_lambda_does() -> None:
    layer = _filled(nn.Linear(5, 7), r=3)
    with torch.no_grad():
        before = layer.delta()
        layer.delora_A.mul_(3)
        layer.delora_B.mul_(0.2)
        torch.testing.assert_close(layer.delta(), before)
        layer.delora_lambda.mul_(2)
        torch.testing.assert_close(layer.delta(), 2 * before)


def test_the_norms_are_saved_and_do_not_train() -> None:
    base = nn.Linear(5, 7)
    layer = _filled(base, r=2)
    assert layer.own_tensors().keys() == {"delora_A", "delora_B", "delora_lambda"}
    assert layer.file_tensors().keys() - layer.own_tensors().keys() == {"delora_w_norm"}
    nn.init.zeros_(base.weight)
    assert layer.delta().any(), "the norms are those of the weight as it was"


def test_layers_may_have_an_r_and_a_lambda_of_their_own() -> None:
    model = tiny("llama")
    inject(model, DeloraConfig(r=4, rank_pattern={"v_proj": 2}, lambda_pattern={"layers.1.self_attn.q_proj": 0.5}))
    layers = list(adapter_layers(model).values())
    assert [len(layer.delora_A) for layer in layers] == [4, 2, 4, 2]
    assert [layer.delora_lambda.item() for layer in layers] == [15, 15, 0.5, 15]
    for key, value in (("rank_pattern", {"x": 1}), ("lambda_pattern", {"x": 1.0})):
        with pytest.raises(AdapterError, match="no adapted module matches 'x'"):
            inject(tiny("llama"), DeloraConfig(**{key: value}))  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="v_proj: must be at least 1"):
        DeloraConfig(rank_pattern={"v_proj": 0}).check()


def test_it_starts_from_no_update_unless_told() -> None:
    for start in (True, False):
        layer = DeloraLinear(nn.Linear(5, 7), "x", DeloraConfig(r=2, init_weights=start))
        assert bool(layer.delta().any()) != start
