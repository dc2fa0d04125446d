"""LoRA with layer_replication: a deeper model of a model's own layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import DECODERS, batch, ids, logits, tiny
from oracle import ours
from torch import nn
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from peftcli.core.files import load_adapter, save_adapter
from peftcli.core.inject import disabled, inject, unload
from peftcli.core.merge import merge
from peftcli.errors import AdapterError
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.replicate import replicate

TWICE = [[0, 2], [1, 2]]


def _layers(model: Any) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def test_the_order_of_the_layers() -> None:
    model = tiny("llama")
    before = list(_layers(model))
    replicate(model, [[1, 2], [0, 2]])
    found = [
        next(n for n, old in enumerate(before) if layer.mlp.up_proj.weight is old.mlp.up_proj.weight)
        for layer in _layers(model)
    ]
    assert found == [1, 0, 1]
    assert [layer.self_attn.layer_idx for layer in _layers(model)] == [0, 1, 2]
    assert [layer.self_attn.layer_idx for layer in before] == [0, 1]
    assert all(layer.self_attn.config is model.config for layer in _layers(model))


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("kind", DECODERS)
def test_it_generates_as_without_a_cache(kind: str) -> None:
    model, _ = ours(kind, "lora", layer_replication=TWICE)
    asked = {"input_ids": ids(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    found = [model.generate(**asked, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*found)


def test_layers_that_call_their_index_otherwise_have_a_place_each_in_the_cache() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 32}
    model = GPTNeoForCausalLM(GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]], window_size=8))
    replicate(model, TWICE)
    assert [layer.attn.attention.layer_id for layer in model.transformer.h] == [0, 1, 2]


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("kind", DECODERS)
def test_merged_it_is_an_ordinary_model(kind: str, tmp_path: Path) -> None:
    model, config = ours(kind, "lora", layer_replication=TWICE)
    expected = logits(model, batch(kind))
    merge(model, config)
    unload(model)  # no adapter is there, and nothing to take back
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == 3
    torch.testing.assert_close(logits(again, batch(kind)), expected, atol=1e-4, rtol=1e-4)


def test_each_layer_keeps_its_own_kind_of_attention() -> None:
    model = tiny("gemma3")
    model.config.layer_types = ["sliding_attention", "full_attention"]
    inject(model, LoraConfig(layer_replication=[[1, 2], [0, 2]]))
    assert model.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    unload(model)
    assert model.config.layer_types == ["sliding_attention", "full_attention"]


def test_unloading_a_copy_leaves_the_model() -> None:
    model, _ = ours("llama", "lora", layer_replication=TWICE)
    expected = logits(model, batch("llama"))
    unload(copy.deepcopy(model))
    assert torch.equal(logits(model, batch("llama")), expected)
    assert model.config.num_hidden_layers == 3


def test_disabled_it_is_the_deeper_model() -> None:
    model, _ = ours("llama", "lora", layer_replication=TWICE)
    deeper = tiny("llama")
    replicate(deeper, TWICE)
    with disabled(model):
        assert torch.equal(logits(model, batch("llama")), logits(deeper, batch("llama")))


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model, config = ours("llama", "lora", layer_replication=TWICE)
    save_adapter(model, config, tmp_path)
    other = tiny("llama")
    wrong = LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]])
    with pytest.raises(AdapterError, match="missing"):
        load_adapter(other, wrong, tmp_path)
    assert other.config.num_hidden_layers == len(_layers(other)) == 2


@pytest.mark.parametrize(
    ("kind", "ranges", "message"),
    [
        ("llama", [[0, 3]], "has the layers 0 to 1, not 2"),
        ("t5", [[0, 2]], "T5ForConditionalGeneration has no single list of transformer layers"),
        ("convnet", [[0, 1]], "ResNetForImageClassification has no single list"),
    ],
)
def test_what_cannot_be_replicated_is_refused(kind: str, ranges: Any, message: str) -> None:
    model = tiny(kind)
    with pytest.raises(AdapterError, match=f"layer_replication: .*{message}"):
        inject(model, LoraConfig(layer_replication=ranges, target_modules="all-linear"))
    assert list(model.state_dict()) == list(tiny(kind).state_dict())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers_block_type", property(lambda self: ["attention"] * 2), "computes layers_block_type from other"),
        ("hidden_size_per_layer_input", 8, "has embeddings for each of its layers"),
    ],
)
def test_a_model_with_more_for_each_layer_is_refused(name: str, value: Any, message: str) -> None:
    model = tiny("llama")
    model.config.__class__ = type("Config", (type(model.config),), {name: value})
    with pytest.raises(AdapterError, match=f"layer_replication: LlamaForCausalLM {message}"):
        inject(model, LoraConfig(layer_replication=TWICE))
    assert model.config.num_hidden_layers == len(_layers(model)) == 2


def test_a_model_with_an_adapter_is_refused() -> None:
    model, _ = ours("llama", "lora")
    with pytest.raises(AdapterError, match="layer_replication: the model holds an adapter already"):
        inject(model, LoraConfig(layer_replication=TWICE), "second")


def test_another_adapter_that_is_refused_does_not_take_the_layers_back() -> None:
    model, _ = ours("llama", "lora", layer_replication=TWICE, target_modules=["q_proj"])
    expected = logits(model, batch("llama"))
    with pytest.raises(AdapterError, match="closest: q_proj"):
        inject(model, LoraConfig(target_modules=["q_porj"]), "second")
    assert torch.equal(logits(model, batch("llama")), expected)
