"""GLoRA computes its formula, whatever its parts are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_tiny import randomise
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.inject import inject
from peftcli.core.targets import wrap
from peftcli.errors import AdapterError
from peftcli.methods.beft import BeftConfig
from peftcli.methods.glora import GloraConfig
from peftcli.methods.lora import LoraConfig


def _layer(base: nn.Module, **settings: Any) -> Any:
    layer = wrap(base, "x", GloraConfig(r=2, **settings)).requires_grad_(True)
    base.requires_grad_(False)
    return layer


@pytest.mark.grid(keep=8)
@pytest.mark.parametrize("a_b", ["lora", "vector", "constant", "none"])
@pytest.mark.parametrize("c", ["lora", "vector", "none"])
@pytest.mark.parametrize("d_e", ["vector", "constant"])
def test_the_formula(a_b: str, c: str, d_e: str) -> None:
    base, x = nn.Linear(5, 4), torch.randn(3, 5)
    layer = _layer(base, config_A_B=a_b, config_C=c, config_D_E=d_e)
    torch.testing.assert_close(layer(x), base(x))
    randomise(layer)
    parts = [part() for part in (layer.glora_A, layer.glora_B, layer.glora_C, layer.glora_D, layer.glora_E)]
    a, b, coupling, d, e = parts
    weight = base.weight + base.weight * a + b
    coupled = base.weight @ coupling[:, 0] if c != "none" else 0
    torch.testing.assert_close(layer(x), F.linear(x, weight, base.bias + base.bias * d + e + coupled))
    merged = layer.folded(dict(base.named_parameters()))
    torch.testing.assert_close(torch.func.functional_call(base, merged, (x,)), layer(x))


def test_without_a_bias_only_the_weight_is_changed() -> None:
    layer = _layer(nn.Linear(5, 4, bias=False))
    assert [name for name in layer.own_tensors() if name[6] not in "AB"] == []
    assert sorted(layer.fixed) == ["glora_C.zeros", "glora_D.zeros", "glora_E.zeros"]


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("bias", ["none", "glora_only"])
@pytest.mark.parametrize("other", [None, LoraConfig(r=2, init_lora_weights=False), BeftConfig(init_weights=False)])
def test_among_other_adapters_it_is_made_from_the_base_models_own(other: AdapterConfig | None, bias: str) -> None:
    base, x = nn.Linear(5, 4), torch.randn(3, 5)
    layer = _layer(wrap(base, "x", other) if other else base, bias=bias)
    randomise(layer)
    merged = {**dict(base.named_parameters()), **layer.folded(dict(base.named_parameters()))}
    torch.testing.assert_close(torch.func.functional_call(base, merged, (x,)), layer(x))


def test_there_is_something_to_train() -> None:
    with pytest.raises(AdapterError, match="nothing to train"):
        GloraConfig(config_A_B="none", config_C="none", config_D_E="none").check()
    settings: dict[str, Any] = {"config_A_B": "none", "target_modules": ["x"]}
    inject(nn.ModuleDict({"x": nn.Linear(5, 4)}), GloraConfig(**settings))
    with pytest.raises(AdapterError, match=r"config_A_B: .* have no bias"):
        inject(nn.ModuleDict({"x": nn.Linear(5, 4, bias=False)}), GloraConfig(**settings))
    model = nn.ModuleDict({"x": nn.Linear(5, 4, bias=False), "head": nn.Linear(4, 2)})
    inject(model, GloraConfig(**settings, modules_to_save=["head"]))
    assert any(value.requires_grad for value in model["head"].parameters())
