"""LoRA with trained rows of embeddings, layers that share one weight, and a deeper model of a model's own layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import DECODERS, batch, ids, labelled, logits, tiny
from oracle import ours
from torch import nn
from transformers import GPTNeoConfig, GPTNeoForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from peftcli.core.files import load_adapter, save_adapter
from peftcli.core.inject import disabled, inject, set_active, unload
from peftcli.core.layer import base_module
from peftcli.core.merge import merge
from peftcli.core.weights import adapter_state, load_state, named_tensors
from peftcli.errors import AdapterError, PeftWarning
from peftcli.methods._token_rows import wrap_rows
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.lora import LoraEmbedding
from peftcli.methods.lora.replicate import replicate

TOKENS = [7, 3, 90]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _rows(module: nn.Module, tokens: list[int], **settings: Any) -> Any:
    layer = wrap_rows(module.requires_grad_(False), tokens, **settings)
    with torch.no_grad():
        layer.trainable_tokens_delta.normal_()
    return layer


def test_the_rows_stand_in_for_the_base_models() -> None:
    base = nn.Embedding(12, 4, padding_idx=3)
    layer = _rows(base, [5, 3])
    expected = base.weight.clone()
    expected[[5, 3]] = layer.trainable_tokens_delta.detach()
    tokens = ids(3, 5) % 12
    torch.testing.assert_close(layer(tokens), expected[tokens])
    torch.testing.assert_close(layer.merged_tensors({"weight": base.weight})["weight"], expected)
    layer(torch.tensor([3, 4])).sum().backward()  # the padding's row is trained when it is named
    assert layer.trainable_tokens_delta.grad.tolist() == [[0.0] * 4, [1.0] * 4]


@pytest.mark.parametrize("bias", [False, True])
def test_the_rows_of_a_head_give_its_logits(bias: bool) -> None:
    base = nn.Linear(4, 12, bias=bias)
    layer = _rows(base, [5, 0])
    x = torch.randn(2, 3, 4)
    tensors = layer.merged_tensors(dict(base.named_parameters()))
    torch.testing.assert_close(layer(x), torch.func.functional_call(base, tensors, (x,)))


def test_they_start_as_the_base_models_or_random() -> None:
    base = nn.Embedding(12, 4)
    same, other = wrap_rows(base, [5, 3]), wrap_rows(base, [5, 3], start_from_base=False)
    assert torch.equal(same.trainable_tokens_delta, base.weight[[5, 3]])
    assert not torch.allclose(other.trainable_tokens_delta, base.weight[[5, 3]], atol=1e-2)


def test_the_scale_of_an_embedding_follows_the_model_to_another_device() -> None:
    with torch.device("meta"):
        base = Gemma3TextScaledWordEmbedding(8, 4, 0)
        base._buffers["embed_scale"] = torch.tensor(3.0)  # from_pretrained leaves no nn.Buffer
        rows, update = wrap_rows(base, [5]), LoraEmbedding(base, "x", LoraConfig())
    for layer in (rows, update):
        layer.to_empty(device="cpu")
        for buffer in layer.buffers():
            buffer.zero_()
        assert layer(torch.tensor([5])).device.type == "cpu"


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("kind", ["llama_tied", "t5", "gemma3", "opt", "gpt2", "bloom"])
def test_layers_that_share_the_weight_share_the_rows_and_stay_tied(kind: str) -> None:
    model, config = ours(kind, "lora", trainable_token_indices=TOKENS)
    names = [name for name in adapter_state(model) if "token_adapter" in name]
    assert len(names) == 1
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.trainable_tokens_delta is head.trainable_tokens_delta
    model(**labelled(kind)).loss.backward()
    assert (head.trainable_tokens_delta.grad.abs().sum(dim=-1) > 0).all()  # the softmax sees every row
    assert not merge(model, config)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    torch.testing.assert_close(embedding.trainable_tokens_delta, base_module(embedding).weight[TOKENS])


def test_layers_with_tokens_of_their_own_are_untied_by_merging() -> None:
    tokens = {"embed_tokens": [3, 90], "lm_head": [5]}
    model, config = ours("llama_tied", "lora", trainable_token_indices=tokens)
    assert sum("token_adapter" in name for name in adapter_state(model)) == 2
    assert merge(model, config)


def test_two_adapters_cannot_both_replace_a_token() -> None:
    model, _ = ours("llama", "lora", trainable_token_indices=TOKENS)
    inject(model, LoraConfig(trainable_token_indices=[90, 5]), "same")
    inject(model, LoraConfig(trainable_token_indices=[5, 6]), "other")
    set_active(model, ["default", "other"])
    with pytest.raises(AdapterError, match=r"same replaces model\.embed_tokens, which default changes too"):
        set_active(model, ["default", "same"])


@pytest.mark.parametrize("settings", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_with_ensure_weight_tying_both_ends_have_one_adapter(settings: dict[str, Any]) -> None:
    model, config = ours("llama_tied", "lora", ensure_weight_tying=True, **settings)
    trained = [parameter for _, _, parameter in named_tensors(model).values()]
    assert len(trained) == len(set(trained))
    expected = logits(model, batch("llama_tied"))
    assert not merge(model, config)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    torch.testing.assert_close(logits(model, batch("llama_tied")), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "reason"), [("llama", "no tied modules were found"), ("llama_tied", "no tied modules are added")]
)
def test_ensure_weight_tying_that_changes_nothing_is_a_warning(kind: str, reason: str) -> None:
    with pytest.warns(PeftWarning, match=f"ensure_weight_tying=True .*: {reason}"):
        inject(tiny(kind), LoraConfig(target_modules=["q_proj"], ensure_weight_tying=True))


def test_tied_adapters_go_out_and_in_again() -> None:
    settings = {"target_modules": ["lm_head"], "ensure_weight_tying": True}
    model, _ = ours("llama_tied", "lora", **settings)
    other, _ = ours("llama_tied", "lora", seed=5, **settings)
    load_state(other, adapter_state(model))
    assert torch.equal(logits(other, batch("llama_tied")), logits(model, batch("llama_tied")))


def test_tokens_beside_a_head_that_has_a_lora_of_its_own() -> None:
    """PEFT cannot merge these: its merged logits are off by more than 5 here."""
    model, config = ours("llama_tied", "lora", trainable_token_indices=TOKENS, target_modules=["lm_head"])
    expected = logits(model, batch("llama_tied"))
    assert merge(model, config)
    torch.testing.assert_close(logits(model, batch("llama_tied")), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, logits(tiny("llama_tied"), batch("llama_tied")), atol=1e-2)


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
