"""VB-LoRA: mixtures of shared vectors, and the file that holds the mixtures only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import batch, labelled, logits, tiny
from oracle import file_of, ours
from torch import nn

from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.core.weights import adapter_state, load_state, load_training_state, named_tensors, training_state
from peftcli.errors import AdapterError
from peftcli.methods import config_from_dict
from peftcli.methods.vblora import VBLoRAConfig
from peftcli.methods.vblora.layers import VBLoraLinear, attach

SETTINGS: dict[str, Any] = {"num_vectors": 12, "vector_length": 8}


def test_each_piece_is_a_mixture_of_the_best_vectors() -> None:
    base, config = nn.Linear(6, 4), VBLoRAConfig(r=2, num_vectors=7, vector_length=2, topk=3)
    layer = VBLoraLinear(base, "x", config).eval()
    attach(base, config, {"x": layer})
    bank = layer.vblora_vector_bank

    def piece(logits: torch.Tensor) -> torch.Tensor:
        best = logits.argsort(descending=True)[:3]
        weights = logits[best].exp() / logits[best].exp().sum()
        return sum(weight * bank[index] for weight, index in zip(weights, best, strict=True))  # type: ignore[return-value]

    a = torch.stack([torch.cat([piece(layer.vblora_logits_A[r, i]) for i in range(3)]) for r in range(2)])
    b = torch.stack([torch.cat([piece(layer.vblora_logits_B[o, r]) for o in range(2)]) for r in range(2)], dim=1)
    x = torch.randn(2, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(layer.delta(), b @ a)
        torch.testing.assert_close(layer(x), base(x) + x @ (b @ a).T)


def test_the_bank_is_one_trained_tensor() -> None:
    model, _ = ours("llama", "vblora", **SETTINGS)
    assert len({id(layer.vblora_vector_bank) for layer in adapter_layers(model).values()}) == 1
    assert "base_model.vblora_vector_bank" in named_tensors(model)
    model(**labelled("llama")).loss.backward()
    assert named_tensors(model)["base_model.vblora_vector_bank"][2].grad.any()


@pytest.mark.grid
@pytest.mark.parametrize(("count", "dtype"), [(255, torch.uint8), (256, torch.int16), (40000, torch.int32)])
def test_mixtures_are_saved_without_their_last_weight(count: int, dtype: torch.dtype, tmp_path: Path) -> None:
    settings = {"num_vectors": count, "vector_length": 16, "topk": 4, "r": 1, "save_only_topk_weights": True}
    model, config = ours("llama", "vblora", **settings, target_modules=["v_proj"])
    save_adapter(model, config, tmp_path)
    tensors = {name.rpartition(".")[2]: value for name, value in file_of(tmp_path)[1].items()}
    assert tensors["vblora_logits_A_topk_indices"].dtype == dtype
    assert tensors["vblora_logits_A_topk_weights"].shape == (1, 2, 3)
    loaded = tiny("llama")
    load_adapter(loaded, config_from_dict(read_config(tmp_path)), tmp_path)
    torch.testing.assert_close(logits(loaded, batch("llama")), logits(model, batch("llama")), atol=1e-5, rtol=1e-5)


def test_saved_mixtures_train_on_with_the_vectors_they_have(tmp_path: Path) -> None:
    model, config = ours("llama", "vblora", **SETTINGS, save_only_topk_weights=True)
    save_adapter(model, config, tmp_path)
    again, read = tiny("llama"), config_from_dict(read_config(tmp_path))
    load_adapter(again, read, tmp_path, trainable=True)
    optimizer = torch.optim.SGD([value for value in again.parameters() if value.requires_grad], lr=0.1)
    again(**labelled("llama")).loss.backward()
    optimizer.step()
    save_adapter(again, read, tmp_path / "more")
    before, after = file_of(tmp_path)[1], file_of(tmp_path / "more")[1]
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in after if not name.endswith("indices")}
    loaded = tiny("llama")
    load_adapter(loaded, config_from_dict(read_config(tmp_path / "more")), tmp_path / "more")
    assert torch.equal(logits(loaded, batch("llama")), logits(again, batch("llama")))


def test_training_state_is_the_scores_whatever_the_file_holds() -> None:
    model, _ = ours("llama", "vblora", **SETTINGS, save_only_topk_weights=True)
    other = tiny("llama")
    inject(other, VBLoRAConfig(**SETTINGS, save_only_topk_weights=True))
    load_training_state(other, training_state(model))
    assert torch.equal(logits(other, batch("llama")), logits(model, batch("llama")))
    with pytest.raises(AdapterError, match="not what its file holds"):
        load_state(other, adapter_state(model))


def test_settings_that_do_not_fit_are_named() -> None:
    with pytest.raises(AdapterError, match="256 does not divide 32") as caught:
        inject(tiny("llama"), VBLoRAConfig())
    assert caught.value.key == "vector_length"
    with pytest.raises(AdapterError, match="3 of 2 vectors"):
        VBLoRAConfig(topk=3, num_vectors=2).check()
