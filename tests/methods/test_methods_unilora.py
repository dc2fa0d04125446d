"""Uni-LoRA: one trained vector for all layers, and where its numbers stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import batch, labelled, logits, tiny
from oracle import ours, theirs
from torch import nn

from peftcli.core.files import load_adapter, read_config, read_tensors, save_adapter
from peftcli.core.layer import adapter_layers
from peftcli.core.weights import named_tensors
from peftcli.methods import config_from_dict
from peftcli.methods.unilora import UniLoraConfig
from peftcli.methods.unilora.layers import UniLoraLinear, attach

SETTINGS: dict[str, Any] = {"r": 2, "theta_d_length": 20}


def test_every_number_stands_at_as_many_places_and_lengths_are_kept() -> None:
    layers, config = (
        [UniLoraLinear(nn.Linear(5, 7), "x", UniLoraConfig(**SETTINGS)) for _ in range(2)],
        UniLoraConfig(**SETTINGS),
    )
    attach(layers[0], config, dict(zip("ab", layers, strict=True)))
    places = torch.cat(
        [value.flatten() for layer in layers for value in (layer.unilora_indices_A, layer.unilora_indices_B)]
    )
    counts = places.bincount(minlength=20)
    assert len(places) == 2 * 2 * (5 + 7)
    assert {int(count) for count in counts} == {2, 3}
    with torch.no_grad():
        numbers = torch.cat([layer._matrix(which).flatten() for layer in layers for which in "AB"])
        torch.testing.assert_close(numbers.norm(), layers[0].unilora_theta_d.norm())


def test_the_update_is_the_product_of_both_matrices() -> None:
    base, config = nn.Linear(5, 7), UniLoraConfig(**SETTINGS, init_weights=False)
    layer = UniLoraLinear(base, "x", config).eval()
    attach(base, config, {"x": layer})
    theta = layer.unilora_theta_d
    a = theta[layer.unilora_indices_A] * layer.unilora_scales_A
    b = theta[layer.unilora_indices_B] * layer.unilora_scales_B
    x = torch.randn(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), base(x) + x @ (b @ a).T)
        torch.testing.assert_close(layer.delta(), b @ a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [42, 7])
def test_places_and_scales_are_pefts(seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftcli.core.inject import inject

    model = tiny("llama").to(dtype)
    inject(model, UniLoraConfig(**SETTINGS, proj_seed=seed))
    monkeypatch.setattr("oracle.tiny", lambda kind: tiny(kind).to(dtype))
    oracle = theirs("llama", "unilora", **SETTINGS, proj_seed=seed).base_model.model
    for path, layer in adapter_layers(model).items():
        for name in layer.fixed:
            assert torch.equal(getattr(layer, name), getattr(oracle.get_submodule(path), name)["default"]), name


def test_the_file_is_the_vector_and_it_is_all_that_trains(tmp_path: Path) -> None:
    model, config = ours("llama", "unilora", **SETTINGS)
    assert named_tensors(model).keys() == {"base_model.unilora_theta_d"}
    model(**labelled("llama")).loss.backward()
    save_adapter(model, config, tmp_path)
    assert read_tensors(tmp_path).keys() == {"base_model.unilora_theta_d"}


def test_saved_places_count_whatever_the_seed_would_give(tmp_path: Path) -> None:
    model, config = ours("llama", "unilora", **SETTINGS, save_indices=True)
    config.proj_seed = 1
    save_adapter(model, config, tmp_path)
    loaded = tiny("llama")
    load_adapter(loaded, config_from_dict(read_config(tmp_path)), tmp_path)
    assert torch.equal(logits(loaded, batch("llama")), logits(model, batch("llama")))
