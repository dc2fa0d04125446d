"""RandLoRA: its formula, and the bases that all layers share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import batch, logits, tiny
from oracle import ours, theirs
from torch import nn

from peftcli.core.files import load_adapter, read_config, read_tensors, save_adapter
from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.methods import config_from_dict
from peftcli.methods.randlora import RandLoraConfig
from peftcli.methods.randlora.layers import RandLoraLinear, attach

TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "down_proj", "up_proj"], "r": 3}


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 8), (8, 5), (6, 6)])
def test_the_update_is_a_sum_over_scaled_bases(inputs: int, outputs: int) -> None:
    base, config = nn.Linear(inputs, outputs), RandLoraConfig(r=2, randlora_alpha=6)
    layer = RandLoraLinear(base, "x", config).eval()
    attach(base, config, {"x": layer})
    nn.init.normal_(layer.randlora_lambda)
    nn.init.normal_(layer.randlora_gamma)
    short, count = min(inputs, outputs), -(-min(inputs, outputs) // 2)
    assert layer.randlora_lambda.shape == (2, count)
    assert layer.randlora_gamma.shape == (count, short)
    total = torch.zeros(max(inputs, outputs), short)
    for pair in range(2 * count):  # what meets is what stands at the same place in PEFT's two flat orders
        r, n = divmod(pair, count)
        scaled = layer.randlora_lambda[r, n] * layer.randlora_A[r, 0] * layer.randlora_gamma[n]
        other = layer.randlora_B.flatten(1)[:, pair]
        total += 3.0 * torch.outer(other, scaled)
    expected = total if short == inputs else total.T
    x = torch.randn(2, 4, inputs)
    with torch.no_grad():
        torch.testing.assert_close(layer.delta(), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer(x), base(x) + x @ expected.T, atol=1e-4, rtol=1e-4)
        assert torch.linalg.matrix_rank(layer.delta()) == short


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"sparse": True}, {"very_sparse": True, "projection_prng_key": 4}])
def test_the_bases_are_pefts_bit_for_bit(
    settings: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama").to(dtype)
    inject(model, RandLoraConfig(**TARGETS, **settings))
    layer = next(iter(adapter_layers(model).values()))
    monkeypatch.setattr("oracle.tiny", lambda kind: tiny(kind).to(dtype))
    oracle = theirs("llama", "randlora", **TARGETS, **settings).base_model
    assert torch.equal(layer.randlora_A, oracle.randlora_A["default"])
    assert torch.equal(layer.randlora_B, oracle.randlora_B["default"])


def test_a_new_adapter_changes_nothing() -> None:
    model = tiny("llama")
    inject(model, RandLoraConfig(**TARGETS))
    assert torch.equal(logits(model, batch("llama")), logits(tiny("llama"), batch("llama")))


def test_without_the_projection_the_file_holds_the_scales_only(tmp_path: Path) -> None:
    model, config = ours("llama", "randlora", **TARGETS, randlora_alpha=5, save_projection=False)
    save_adapter(model, config, tmp_path)
    assert {name.rpartition(".")[2] for name in read_tensors(tmp_path)} == {"randlora_lambda", "randlora_gamma"}
    loaded = tiny("llama")
    load_adapter(loaded, config_from_dict(read_config(tmp_path)), tmp_path)
    assert torch.equal(logits(loaded, batch("llama")), logits(model, batch("llama")))
