"""LoRA with trained rows of embeddings, and layers that share one weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_tiny import batch, ids, labelled, logits, tiny
from oracle import ours
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from peftcli.core.inject import inject, set_active
from peftcli.core.layer import base_module
from peftcli.core.merge import merge
from peftcli.core.weights import adapter_state, load_state, named_tensors
from peftcli.errors import AdapterError, PeftWarning
from peftcli.methods._token_rows import wrap_rows
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.lora import LoraEmbedding

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
