"""DEFT: what is taken from the weight and what is given back, also over a trained bias and among other adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_tiny import batch, logits, randomise, tiny
from oracle import ours
from torch import nn

from peftcli.core.inject import inject, set_trainable
from peftcli.core.merge import merge
from peftcli.errors import AdapterError
from peftcli.methods.deft import DeftConfig
from peftcli.methods.deft.layers import DeftLinear


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("method", ["relu", "qr"])
@pytest.mark.parametrize("para", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_directions_are_taken_away_and_given_back(method: Any, para: bool, bias: bool) -> None:
    base = nn.Linear(5, 7, bias=bias)
    config = DeftConfig(r=3, alpha=6, decomposition_method=method, para=para, init_weights=False)
    layer = DeftLinear(base, "x", config)
    nn.init.normal_(layer.deft_P)
    x = torch.randn(2, 4, 5)
    with torch.no_grad():
        q, k = (torch.linalg.qr(layer.deft_P)[0],) * 2 if method == "qr" else (layer.deft_P, layer.deft_P.relu())
        weight = base.weight - q @ k.T @ base.weight + (0 if para else 2 * q @ layer.deft_R)
        torch.testing.assert_close(base.weight + layer.delta(), weight)
        torch.testing.assert_close(layer(x), x @ weight.T + (base.bias if bias else 0))


def test_with_qr_and_nothing_given_back_the_directions_are_gone() -> None:
    base = nn.Linear(5, 7)
    layer = DeftLinear(base, "x", DeftConfig(r=3, decomposition_method="qr", para=True))
    with torch.no_grad():
        gone = torch.linalg.qr(layer.deft_P)[0].T @ (base.weight + layer.delta())
    torch.testing.assert_close(gone, torch.zeros(3, 5), atol=1e-6, rtol=0)
    assert layer.own_tensors().keys() == {"deft_P"}


def test_only_what_is_given_back_is_dropped_out() -> None:
    base = nn.Linear(5, 7)
    layer = DeftLinear(base, "x", DeftConfig(r=3, deft_dropout=0.999))
    nn.init.normal_(layer.deft_P)
    x = torch.randn(2, 5)
    with torch.no_grad():
        weight = base.weight - layer.deft_P @ layer.deft_P.relu().T @ base.weight
        torch.manual_seed(1)  # drops all of x
        torch.testing.assert_close(layer(x), x @ weight.T + base.bias)


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("settings", [{}, {"decomposition_method": "qr"}, {"alpha": 3}])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_new_adapter_changes_nothing(kind: str, settings: dict[str, Any]) -> None:
    model = tiny(kind)
    inject(model, DeftConfig(**settings))
    torch.testing.assert_close(logits(model, batch(kind)), logits(tiny(kind), batch(kind)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_among_other_adapters_it_takes_from_the_models_own_weight(bias: str) -> None:
    model, first = ours("opt", "lora", target_modules=["q_proj"], init_lora_weights=False)
    second = DeftConfig(target_modules=["q_proj"], bias=bias)
    inject(model, second, "second")
    set_trainable(model, True)
    randomise(model)
    expected = logits(model, batch("opt"))
    merge(model, first, second)
    torch.testing.assert_close(logits(model, batch("opt")), expected, atol=1e-4, rtol=1e-4)


def test_alpha_is_above_zero() -> None:
    with pytest.raises(AdapterError, match="must be above 0, not 0"):
        inject(tiny("llama"), DeftConfig(alpha=0))


@pytest.mark.parametrize("method", ["relu", "qr"])
def test_an_adapter_in_half_precision_computes_as_it_does_in_full(method: Any) -> None:
    layer = DeftLinear(nn.Linear(5, 7), "x", DeftConfig(r=3, decomposition_method=method)).bfloat16()
    x = torch.randn(2, 5, dtype=torch.bfloat16)
    found = layer(x)
    found.sum().backward()
    assert all(value.grad is not None for value in layer.own_tensors().values())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer.float()(x.float()), atol=0.05, rtol=0.02)
