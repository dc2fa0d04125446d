"""LLaMA-Adapter: its formula on attention of several shapes, and positions under padding."""

from __future__ import annotations

import math
from typing import Any, cast

import peft
import pytest
import torch
import torch.nn.functional as F
from models_tiny import BOS, CACHE, EOS, PAD, batch, ids, labelled, logits, randomise, tiny
from oracle import ours
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    RoFormerConfig,
    RoFormerForMaskedLM,
    XGLMConfig,
    XGLMForCausalLM,
)
from transformers.models.gemma3.modeling_gemma3 import apply_rotary_pos_emb

from peftcli.core.inject import disabled, inject, set_trainable
from peftcli.core.layer import adapter_layers
from peftcli.core.merge import merge
from peftcli.core.prompts.generate import generate
from peftcli.core.weights import adapter_state, load_state
from peftcli.errors import AdapterError
from peftcli.methods.adaption_prompt import AdaptionPromptConfig
from peftcli.methods.adaption_prompt import layers as module
from peftcli.peft_api import get_peft_model

SETTINGS: dict[str, Any] = {"adapter_len": 3, "adapter_layers": 2}
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": PAD, "bos_token_id": BOS,
    "eos_token_id": EOS,
}  # fmt: skip


def _mistral() -> Any:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES)).eval()


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "mixtral"])
def test_attention_of_llamas_shape_is_pefts(kind: str) -> None:
    """PEFT knows the attention of Llama, by the model's name."""
    base, other = (_mistral() if kind == "mistral" else tiny(kind) for _ in range(2))
    other.config.model_type = "llama"
    oracle: Any = peft.get_peft_model(other, peft.AdaptionPromptConfig(**SETTINGS))
    randomise(oracle)
    inject(base, AdaptionPromptConfig(**SETTINGS))
    load_state(base, {name: value for name, value in oracle.state_dict().items() if ".adaption_" in name})
    torch.testing.assert_close(
        logits(base, batch("llama")), logits(oracle.eval(), batch("llama")), atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(logits(base, batch("llama")), logits(tiny("llama"), batch("llama")), atol=1e-2)


def _seen(kind: str, attention: Any, x: torch.Tensor, given: dict[str, Any], prompt: torch.Tensor) -> torch.Tensor:
    """By hand: what the queries see of the prompt, behind the output layer but for its bias."""

    def heads(value: torch.Tensor) -> torch.Tensor:
        return value.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    query, key, value = heads(attention.q_proj(x)), heads(attention.k_proj(prompt)), heads(attention.v_proj(prompt))
    if kind == "gemma3":
        query, key = attention.q_norm(query), attention.k_norm(key)
        query, _ = apply_rotary_pos_emb(query, query, *given["position_embeddings"])
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = query @ key.transpose(2, 3) * getattr(attention, "scaling", 1 / math.sqrt(attention.head_dim))
    out = attention.o_proj if kind == "gemma3" else attention.out_proj
    return F.linear((scores.softmax(-1) @ value).transpose(1, 2).flatten(2), out.weight)


@pytest.mark.parametrize("kind", ["gemma3", "opt"])
def test_norms_rotation_and_biases_are_those_of_the_attention(kind: str) -> None:
    model, _ = ours(kind, "adaption_prompt", **SETTINGS)
    layer: Any = next(iter(adapter_layers(model).values()))
    calls: list[Any] = []
    layer.register_forward_hook(lambda *call: calls.append(call[1:]), with_kwargs=True)
    with torch.no_grad():
        model(**batch(kind))
        args, given, found = calls[0]
        x = args[0] if args else given["hidden_states"]
        expected = layer.base_layer(*args, **given)[0] + layer.adaption_gate * _seen(
            kind, layer.base_layer, x, given, layer.adaption_prompt
        )
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bloom"])
def test_a_new_adapter_is_the_base_model_and_only_the_last_layers_have_one(kind: str) -> None:
    model = tiny(kind)
    inject(model, AdaptionPromptConfig(adapter_len=3, adapter_layers=1))
    inputs = batch(kind)
    inputs["attention_mask"][1, 3:5] = 0
    assert torch.equal(logits(model, inputs), logits(tiny(kind), inputs))
    (path,) = adapter_layers(model)
    assert ".1." in path
    assert len(adapter_state(model)) == 2


def adapted_and_called(model: nn.Module, kind: str) -> tuple[Any, Any]:
    """The adapter's only layer, and what it was called with and gave."""
    inject(model, AdaptionPromptConfig(adapter_len=3, adapter_layers=1))
    (layer,) = cast("list[Any]", [*adapter_layers(model).values()])
    calls: list[Any] = []
    layer.register_forward_hook(lambda *call: calls.append(call[1:]), with_kwargs=True)
    with torch.no_grad():
        layer.adaption_gate.fill_(2.0)
        logits(model, batch(kind))
    return layer, calls[0]


def test_mpts_attention_has_biases_of_three_dimensions() -> None:
    model = MptForCausalLM(MptConfig(vocab_size=96, d_model=32, n_heads=4, n_layers=1, max_seq_len=64)).eval()
    attention = model.transformer.blocks[0].attn
    layer, (args, given, found) = adapted_and_called(model, "llama")
    with torch.no_grad():
        heads = [part.unflatten(-1, (4, -1)).transpose(1, 2) for part in attention.Wqkv(args[0]).chunk(3, -1)]
        keys, values = (
            part.unflatten(-1, (4, -1)).transpose(1, 2)
            for part in attention.Wqkv(layer.adaption_prompt).chunk(3, -1)[1:]
        )
        seen = (heads[0] @ keys.mT * attention.softmax_scale).softmax(-1) @ values
        expected = attention(*args, **given)[0] + 2 * attention.out_proj(seen.transpose(1, 2).flatten(2))
    torch.testing.assert_close(found[0], expected)


def test_roformers_queries_are_rotated_and_the_keys_of_the_vectors_are_not() -> None:
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    model = RoFormerForMaskedLM(RoFormerConfig(**sizes, num_hidden_layers=1, rotary_value=True)).eval()
    attention = model.roformer.encoder.layer[0].attention.self
    layer, (args, given, found) = adapted_and_called(model, "bert")
    with torch.no_grad():
        x, prompt, sines = args[0], layer.adaption_prompt, given.get("sinusoidal_pos", args[2] if args[2:] else None)
        query, keys, values = (
            project(part).unflatten(-1, (4, -1)).transpose(1, 2)
            for project, part in ((attention.query, x), (attention.key, prompt), (attention.value, prompt))
        )
        query, _ = attention.apply_rotary_position_embeddings(sines, query, query)
        seen = ((query @ keys.mT / math.sqrt(8)).softmax(-1) @ values).transpose(1, 2).flatten(2)
        expected = attention(*args, **given)[0] + 2 * seen
    torch.testing.assert_close(found[0], expected)


def test_xglms_attention_checks_the_size_of_its_mask() -> None:
    model = XGLMForCausalLM(XGLMConfig(vocab_size=96, d_model=32, ffn_dim=64, num_layers=1, attention_heads=4)).eval()
    inject(model, AdaptionPromptConfig(adapter_len=3, adapter_layers=1))
    before = logits(model, batch("llama"))
    (layer,) = cast("list[Any]", [*adapter_layers(model).values()])
    with torch.no_grad():
        layer.adaption_gate.fill_(2.0)
    together, inputs = logits(model, batch("llama")), batch("llama")
    assert not torch.allclose(together, before, atol=1e-3)
    alone = logits(model, {name: value[1:] for name, value in inputs.items()})
    torch.testing.assert_close(together[1:], alone)


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_left_padded_rows_generate_what_each_gives_alone(kind: str, options: dict[str, Any]) -> None:
    model, _ = ours(kind, "adaption_prompt", **SETTINGS)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.adaption_gate.fill_(4.0)
    given, mask = ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    together = generate(model, input_ids=given, attention_mask=mask, **settings, **options)
    alone = generate(model, input_ids=given[1:, 3:], attention_mask=mask[1:, 3:], **settings, **options)
    assert torch.equal(together[1, 3:], alone[0])
    if options.get("num_beams") is None:
        tokens = given[:1]
        for _ in range(6):
            tokens = torch.cat([tokens, logits(model, {"input_ids": tokens})[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(together[:1], tokens)
    with disabled(model):
        assert not torch.equal(together, generate(model, input_ids=given, attention_mask=mask, **settings, **options))


def test_positions_are_counted_from_where_left_padding_ends() -> None:
    model, _ = ours("llama", "adaption_prompt", **SETTINGS)
    given, mask = ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    together = logits(model, {"input_ids": given, "attention_mask": mask})
    torch.testing.assert_close(together[1, 3:], logits(model, {"input_ids": given[1:, 3:]})[0], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        start = model(input_ids=given[:, :5], attention_mask=mask[:, :5], use_cache=True)
        end = model(input_ids=given[:, 5:], attention_mask=mask, **{CACHE: start[CACHE]}).logits
    torch.testing.assert_close(end, together[:, 5:], atol=1e-4, rtol=1e-4)


def test_dropout_of_the_attention_is_not_the_vectors() -> None:
    def term(dropout: float) -> torch.Tensor:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=dropout)).train()
        inject(model, AdaptionPromptConfig(**SETTINGS))
        layer: Any = next(iter(adapter_layers(model).values()))
        found: list[torch.Tensor] = []
        right = layer._attend
        layer._attend = lambda *args: found.append(right(*args)) or found[0]
        model(**batch("llama"))
        assert layer.base_layer.training
        return found[0]

    torch.manual_seed(0)
    prompt = term(0.9)
    torch.testing.assert_close(term(0.0), prompt)


def test_two_adapters_each_have_their_vectors_and_neither_is_merged() -> None:
    model: Any = get_peft_model(tiny("llama"), AdaptionPromptConfig(**SETTINGS, task_type="CAUSAL_LM"))
    model.add_adapter("other", AdaptionPromptConfig(adapter_len=8, adapter_layers=1, task_type="CAUSAL_LM"))
    found = []
    for seed, name in enumerate(("default", "other")):
        model.set_adapter(name)
        randomise(model, seed)
        found.append(logits(model.eval(), batch("llama")))
    assert not torch.allclose(*found, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(logits(model, batch("llama")), found[0])
    with pytest.raises(AdapterError, match="cannot be merged"):
        merge(model.base_model.model, AdaptionPromptConfig(**SETTINGS))


def test_attention_that_takes_no_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = ours("llama", "adaption_prompt", **SETTINGS)
    monkeypatch.setattr(module, "_NO_MASK", ("sdpa",))
    with pytest.raises(AdapterError, match="does not work with attn_implementation sdpa"):
        model(**batch("llama"))


def test_pefts_output_layer_adds_its_bias_twice_whatever_the_gate() -> None:
    def base() -> Any:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)).eval()
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.o_proj.bias)
        return model

    expected, model = logits(base(), batch("llama")), base()
    inject(model, AdaptionPromptConfig(**SETTINGS))
    set_trainable(model, True)
    assert torch.equal(logits(model, batch("llama")), expected)
    oracle: Any = peft.get_peft_model(base(), peft.AdaptionPromptConfig(**SETTINGS))
    assert not torch.allclose(logits(oracle, batch("llama")), expected, atol=1e-4)
    assert model(**labelled("llama")).loss.requires_grad
