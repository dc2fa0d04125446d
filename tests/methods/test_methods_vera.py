"""VeRA: its formula, and the two matrices that all layers share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models_tiny import batch, logits, tiny
from oracle import ours, theirs
from torch import nn

from peftcli.core.files import load_adapter, read_config, read_tensors, save_adapter
from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.core.weights import adapter_state, load_state
from peftcli.methods import config_from_dict
from peftcli.methods.vera import VeraConfig
from peftcli.methods.vera.layers import VeraLinear, attach

TARGETS = {"target_modules": ["q_proj", "down_proj"], "r": 3}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_update_is_two_scaled_projections(dropout: float) -> None:
    base = nn.Linear(5, 7)
    layer = VeraLinear(base, "x", VeraConfig(r=3, vera_dropout=dropout)).eval()
    attach(base, VeraConfig(r=3), {"x": layer})
    nn.init.normal_(layer.vera_lambda_b)
    x = torch.randn(2, 4, 5)
    with torch.no_grad():
        delta = torch.diag(layer.vera_lambda_b) @ layer.vera_B @ torch.diag(layer.vera_lambda_d) @ layer.vera_A
        torch.testing.assert_close(layer(x), base(x) + x @ delta.T)
        torch.testing.assert_close(layer.delta(), delta)


def test_a_new_adapter_changes_nothing_and_starts_from_d_initial() -> None:
    model, config = tiny("llama"), VeraConfig(**TARGETS, d_initial=0.25)  # type: ignore[arg-type]
    layers = inject(model, config).layers.values()
    assert all((layer.vera_lambda_d == 0.25).all() for layer in layers)
    assert torch.equal(logits(model, batch("llama")), logits(tiny("llama"), batch("llama")))


def test_every_layer_has_the_same_matrices_and_the_file_has_them_once() -> None:
    model, _ = ours("llama", "vera", **TARGETS)
    layers = list(adapter_layers(model).values())
    assert len({id(layer.vera_A) for layer in layers} | {id(layer.vera_B) for layer in layers}) == 2
    state = adapter_state(model)
    assert state["base_model.vera_A"].shape == (3, 64), "as wide as the widest layer"
    assert state["base_model.vera_B"].shape == (32, 3)
    assert not any(name.endswith((".vera_A", ".vera_B")) and name.count(".") > 1 for name in state)
    assert not any(layer.vera_A.requires_grad for layer in layers)


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("key", [0, 5])
def test_the_matrices_are_pefts_bit_for_bit(key: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT rounds them to the base model's dtype, so that the seed alone does not say which they are."""
    model = tiny("llama").to(dtype)
    inject(model, VeraConfig(**TARGETS, projection_prng_key=key))  # type: ignore[arg-type]
    layer = next(iter(adapter_layers(model).values()))
    monkeypatch.setattr("oracle.tiny", lambda kind: tiny(kind).to(dtype))
    oracle = theirs("llama", "vera", **TARGETS, projection_prng_key=key).base_model
    for found, expected in ((layer.vera_A, oracle.vera_A["default"]), (layer.vera_B, oracle.vera_B["default"])):
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype


def test_without_the_projection_the_file_holds_the_vectors_only(tmp_path: Path) -> None:
    model, config = ours("llama", "vera", **TARGETS, save_projection=False, projection_prng_key=9)
    save_adapter(model, config, tmp_path)
    assert {name.rpartition(".")[2] for name in read_tensors(tmp_path)} == {"vera_lambda_b", "vera_lambda_d"}
    loaded = tiny("llama")
    load_adapter(loaded, config_from_dict(read_config(tmp_path)), tmp_path)
    assert torch.equal(logits(loaded, batch("llama")), logits(model, batch("llama")))


@pytest.mark.parametrize("saved", [True, False])
def test_a_model_on_the_meta_device_is_merged_all_the_same(saved: bool, tmp_path: Path) -> None:
    model, config = ours("llama", "vera", **TARGETS, save_projection=saved)
    save_adapter(model, config, tmp_path)
    empty, read = tiny("llama").to("meta"), config_from_dict(read_config(tmp_path))
    read.inference_mode = True
    inject(empty, read)
    load_state(empty, read_tensors(tmp_path))
    for name, layer in adapter_layers(model).items():
        weight = {"weight": layer.base_layer.weight}
        found = adapter_layers(empty)[name].folded(weight)["weight"]
        torch.testing.assert_close(found, layer.folded(weight)["weight"])
