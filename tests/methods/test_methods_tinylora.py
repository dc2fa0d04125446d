"""TinyLoRA: its formula, which layers share their numbers, and what the file leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import batch, logits, tiny
from oracle import ours, theirs
from torch import nn

from peftcli.core.files import read_tensors, save_adapter
from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.core.merge import merge
from peftcli.core.weights import named_tensors
from peftcli.errors import AdapterError
from peftcli.methods.tinylora import TinyLoraConfig
from peftcli.methods.tinylora.layers import TinyLoraEmbedding, TinyLoraLinear, attach

SETTINGS: dict[str, Any] = {"r": 3, "u": 5, "init_weights": "uniform", "init_v_bound": 0.5}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_update_mixes_the_weights_principal_directions(dropout: float) -> None:
    base, config = nn.Linear(7, 5), TinyLoraConfig(**SETTINGS, tinylora_dropout=dropout)
    layer = TinyLoraLinear(base, "x", config).eval()
    attach(base, config, {"x": layer})
    u, s, vt = torch.linalg.svd(base.weight.detach())
    torch.testing.assert_close(layer.tinylora_B @ layer.tinylora_A, u[:, :3] @ torch.diag(s[:3]) @ vt[:3])
    mixture = sum(number * part for number, part in zip(layer.tinylora_v, layer.tinylora_P, strict=True))
    x = torch.randn(2, 4, 7)
    with torch.no_grad():
        delta = layer.tinylora_B @ mixture @ layer.tinylora_A
        torch.testing.assert_close(layer.delta(), delta)
        torch.testing.assert_close(layer(x), base(x) + x @ delta.T)


def test_an_embeddings_update_is_looked_up() -> None:
    base, config, ids = nn.Embedding(9, 6), TinyLoraConfig(**SETTINGS), torch.tensor([[3, 0, 3]])
    layer = TinyLoraEmbedding(base, "x", config)
    attach(base, config, {"x": layer})
    with torch.no_grad():
        merged = layer.merged_tensors({"weight": base.weight})["weight"]
        torch.testing.assert_close(layer(ids), merged[ids])
        assert (merged - base.weight).norm() > 0.1


def test_an_embedding_that_scales_is_merged_to_the_same_logits() -> None:
    model, config = ours("gemma3", "tinylora", r=3, target_modules=["embed_tokens"])
    expected = logits(model, batch("gemma3"))
    assert merge(model, config), "it had the head's weight too"
    torch.testing.assert_close(logits(model, batch("gemma3")), expected)


@pytest.mark.parametrize(
    ("tying", "groups"), [(0.0, [0, 1, 2, 3, 4]), (0.4, [0, 1, 2, 2, 2]), (0.5, [0, 0, 1, 1, 1]), (1.0, [0] * 5)]
)
def test_neighbours_share_their_numbers(tying: float, groups: list[int]) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    layers: list[Any] = list(inject(model, TinyLoraConfig(weight_tying=tying, target_modules=r"\d")).layers.values())
    assert [layer.group for layer in layers] == groups
    assert len({id(layer.tinylora_v) for layer in layers}) == len(set(groups)) == len(named_tensors(model))


def test_thirteen_numbers_can_be_all_that_trains(tmp_path: Path) -> None:
    model, config = ours("llama", "tinylora", u=13, weight_tying=1.0, save_projection=False)
    assert sum(value.numel() for _, _, value in named_tensors(model).values()) == 13
    save_adapter(model, config, tmp_path)
    assert {name.rpartition(".")[2] for name in read_tensors(tmp_path)} == {"0", "tinylora_A", "tinylora_B"}


def test_the_random_matrices_are_pefts_bit_for_bit() -> None:
    settings = {"r": 3, "u": 5, "target_modules": ["q_proj", "down_proj"], "projection_seed": 11}
    model, oracle = ours("llama", "tinylora", **settings)[0], theirs("llama", "tinylora", **settings).base_model.model
    for path, layer in adapter_layers(model).items():
        assert torch.equal(layer.tinylora_P, oracle.get_submodule(path).tinylora_P["default"])


def test_a_new_adapter_changes_nothing() -> None:
    model = tiny("llama")
    inject(model, TinyLoraConfig())
    assert torch.equal(logits(model, batch("llama")), logits(tiny("llama"), batch("llama")))


def test_other_layers_are_refused() -> None:
    with pytest.raises(AdapterError, match="LlamaRMSNorm; TinyLoRA adapts linear layers and embeddings"):
        inject(tiny("llama"), TinyLoraConfig(target_modules=["input_layernorm"]))


def test_weight_tying_is_a_share() -> None:
    assert [key for key, _ in TinyLoraConfig.unchecked(weight_tying=1.5).problems()] == ["weight_tying"]
