"""MiSS and its variants."""

from __future__ import annotations

import pytest
import torch
from models_tiny import batch, logits, tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftcli.core.inject import inject, set_trainable
from peftcli.core.layer import adapter_layers
from peftcli.core.merge import merge
from peftcli.errors import AdapterError
from peftcli.methods.miss import MissConfig
from peftcli.methods.miss.layers import wrap


@pytest.mark.parametrize("base", [nn.Linear(7, 6), Conv1D(6, 7)])
@pytest.mark.parametrize("mini_r", [None, 2, 6])
def test_inputs_share_a_block(base: nn.Module, mini_r: int | None) -> None:
    config = MissConfig(r=3) if mini_r is None else MissConfig(r=3, init_weights="mini", mini_r=mini_r)
    layer = wrap(base, "x", config).eval()
    columns = mini_r or 6
    assert layer.miss_block.shape == (3, columns)
    nn.init.normal_(layer.miss_block)
    delta = torch.stack([layer.miss_block[i % 3, o % columns] for o in range(6) for i in range(7)]).view(6, 7)
    x = torch.randn(2, 4, 7)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), base(x) + x @ delta.T)
        torch.testing.assert_close(layer.delta(), delta)


@pytest.mark.parametrize("base", [nn.Linear(4, 6), Conv1D(6, 4)])
def test_bat_multiplies_blocks_of_the_weight(base: nn.Module) -> None:
    layer = wrap(base, "x", MissConfig(r=2, init_weights="bat")).eval()
    nn.init.normal_(layer.miss_block)
    weight = base.weight.T if isinstance(base, Conv1D) else base.weight
    delta = torch.zeros(6, 4)
    for o in range(3):
        for i in range(2):
            rows, columns = slice(2 * o, 2 * o + 2), slice(2 * i, 2 * i + 2)
            delta[rows, columns] = (weight[rows, columns] + torch.eye(2)) @ layer.miss_block[o]
    x = torch.randn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), base(x) + x @ delta.T)
        merged = layer.folded({"weight": base.weight})["weight"]
        torch.testing.assert_close(merged, base.weight + (delta.T if isinstance(base, Conv1D) else delta))


def test_bat_over_another_adapter_starts_from_the_models_own_weight() -> None:
    model = tiny("llama")
    configs = [MissConfig(r=8, init_weights="bat", target_modules=["q_proj"]) for _ in range(2)]
    for name, config in zip(("first", "second"), configs, strict=True):
        inject(model, config, name)
    set_trainable(model, True)
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.miss_block, std=0.1)
    outer = model.model.layers[0].self_attn.q_proj
    weight = outer.base_layer.base_layer.weight
    expected = weight + outer.delta_of(weight) + outer.base_layer.delta_of(weight)
    torch.testing.assert_close(outer.folded({"weight": weight})["weight"], expected)
    before = logits(model, batch("llama"))
    merge(model, *configs)
    torch.testing.assert_close(logits(model, batch("llama")), before, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_cut_is_refused() -> None:
    for settings, key, message in (
        ({"r": 9}, "r", "9 is above 8, the inputs of x"),
        ({"r": 3, "init_weights": "bat"}, "r", "3 does not divide 8"),
        ({"r": 2, "init_weights": "mini", "mini_r": 5}, "mini_r", "5 does not divide 6"),
    ):
        with pytest.raises(AdapterError, match=message) as caught:
            wrap(nn.Linear(8, 6), "x", MissConfig(**settings))  # type: ignore[arg-type]
        assert caught.value.key == key
    with pytest.raises(AdapterError, match="'batt'"):
        MissConfig(init_weights="batt").check()  # type: ignore[arg-type]


def test_it_starts_from_no_update_unless_told() -> None:
    assert not wrap(nn.Linear(8, 6), "x", MissConfig(r=2)).miss_block.any()
    assert wrap(nn.Linear(8, 6), "x", MissConfig(r=2, init_weights=False)).miss_block.any()
