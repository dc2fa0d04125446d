"""What is special of the methods that train vectors, biases, norms and rows: what each finds to train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_tiny import batch, logits, randomise, tiny
from torch import nn
from torch.nn.utils import parametrize
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P

from peftcli.core.inject import inject, set_trainable
from peftcli.core.layer import adapter_layers
from peftcli.core.merge import merge
from peftcli.core.targets import wrap
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
from peftcli.methods._families import TARGETS
from peftcli.methods.beft import BeftConfig
from peftcli.methods.glora import GloraConfig
from peftcli.methods.ia3 import IA3Config
from peftcli.methods.ln_tuning import LNTuningConfig
from peftcli.methods.trainable_tokens import TrainableTokensConfig


def _feedforward(kind: str, **settings: Any) -> tuple[set[str], IA3Config]:
    config = IA3Config(**settings)
    layers = adapter_layers(inject_into(kind, config))
    return {name for name, layer in layers.items() if layer.feedforward}, config


def inject_into(kind: str, config: IA3Config) -> nn.Module:
    model = tiny(kind)
    inject(model, config)
    return model


def test_the_family_says_which_inputs_are_scaled() -> None:
    found, config = _feedforward("llama")
    assert found == {f"model.layers.{index}.mlp.down_proj" for index in (0, 1)}
    assert config.feedforward_modules == {"down_proj"}
    assert _feedforward("llama", target_modules=["q_proj"])[0] == set()


def test_inputs_to_scale_are_named_by_a_pattern_too() -> None:
    found, config = _feedforward("llama", target_modules=r".*\.(q|down)_proj", feedforward_modules=r".*\.1\..*")
    assert found == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}
    assert config.feedforward_modules == {"1.mlp.down_proj", "1.self_attn.q_proj"}


@pytest.mark.parametrize("entries", [["down_porj"], r".*\.down_porj"])
def test_a_misspelt_feedforward_module_is_an_error(entries: Any) -> None:
    with pytest.raises(AdapterError, match="no module of LlamaForCausalLM matches"):
        inject_into("llama", IA3Config(target_modules=r".*_proj", feedforward_modules=entries))
    with pytest.raises(AdapterError, match="is not in target_modules"):
        inject_into("llama", IA3Config(target_modules=["q_proj"], feedforward_modules=["down_proj"]))


def test_a_file_may_name_feedforward_modules_that_the_model_lacks() -> None:
    """PEFT's of Mixtral do: its default has been no module since the experts became parameters."""
    config = IA3Config(target_modules=["k_proj", "w2"], feedforward_modules=["w2"], inference_mode=True)
    layers = adapter_layers(inject_into("mixtral", config))
    assert [*layers] == [f"model.layers.{index}.self_attn.k_proj" for index in (0, 1)]


@pytest.mark.parametrize(("kind", "mergeable"), [("qwen2", True), ("bert", True), ("llama", False), ("t5", False)])
def test_it_merges_into_layers_with_a_bias(kind: str, mergeable: bool) -> None:
    model, config = tiny(kind), BeftConfig()
    assert config.merge_problem() is None  # not known yet
    inject(model, config)
    randomise(model)
    expected = logits(model, batch(kind))
    assert (config.merge_problem() is None) == mergeable
    if mergeable:
        merge(model, config)
    else:
        with pytest.raises(AdapterError, match=r"cannot be merged here: .* has no bias"):
            merge(model, config)
        with pytest.raises(AdapterError, match="cannot be merged here"):
            merge(model)
    torch.testing.assert_close(logits(model, batch(kind)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "names"),
    [("bert", ["LayerNorm"]), ("opt", ["final_layer_norm", "self_attn_layer_norm"]), ("qwen2", None)],
)
def test_families_without_a_default_train_every_norm(kind: str, names: list[str] | None) -> None:
    config = LNTuningConfig()
    inject(tiny(kind), config)
    assert config.target_modules == (names or ["post_attention_layernorm"])


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"parallel_attn": True}, ["input_layernorm", "ln_f"]),
        ({"parallel_attn": False}, [*TARGETS["ln_tuning"]["falcon"]]),
        ({"new_decoder_architecture": True, "num_kv_heads": 1}, ["ln_attn", "ln_f", "ln_mlp"]),
    ],
    ids=["7b", "rw", "40b"],
)
def test_of_a_familys_norms_those_train_that_the_model_has(settings: dict[str, Any], names: list[str]) -> None:
    sizes = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LNTuningConfig()
    inject(FalconForCausalLM(FalconConfig(**sizes, **settings)), config)
    assert config.target_modules == names


def test_a_norm_counts_whatever_its_class_is_called() -> None:
    model = nn.ModuleDict({"one": NemotronLayerNorm1P(4), "other": nn.RMSNorm(4), "linear": nn.Linear(4, 4)})
    assert [*inject(model, LNTuningConfig()).layers] == ["one", "other"]


def test_the_output_projection_of_an_attention_is_trained() -> None:
    model, x = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}), torch.randn(3, 2, 8)
    inject(model, LNTuningConfig(target_modules=["out_proj"]))
    model["attention"](x, x, x)[0].sum().backward()
    assert model["attention"].out_proj.copy.weight.grad.any()


def test_norms_that_the_data_never_reaches_are_left_out() -> None:
    config = LNTuningConfig(unreached=["embeddings.LayerNorm"])
    layers = inject(
        nn.ModuleDict({"embeddings": nn.ModuleDict({"LayerNorm": nn.LayerNorm(4)}), "norm": nn.LayerNorm(4)}), config
    ).layers
    assert [*layers] == config.target_modules == ["norm"]


def test_weights_and_biases_are_trained_under_the_methods_name() -> None:
    model = tiny("gpt2")
    inject(model, LNTuningConfig(target_modules=["ln_f"]))
    prefix = "base_model.model.transformer.ln_f.ln_tuning_layers"
    assert {name: tuple(value.shape) for name, value in adapter_state(model).items()} == {
        f"{prefix}.weight": (32,),
        f"{prefix}.bias": (32,),
    }


@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_the_output_has_the_dtype_of_the_base_layers(input_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    model = tiny("llama")
    for norm in (model.model.norm.to(weight_dtype), tiny("gemma3").model.norm.to(weight_dtype)):
        layer = wrap(norm, "norm", LNTuningConfig())
        x = torch.randn(2, 3, 32, dtype=input_dtype)
        expected = norm(x)
        assert layer(x).dtype == expected.dtype
        torch.testing.assert_close(layer(x), expected, atol=2e-2, rtol=2e-2)
        assert {parameter.dtype for parameter in layer.own_tensors().values()} == {torch.float32}


def test_a_layer_that_reads_ids_can_be_trained_whole() -> None:
    model = tiny("llama").to(torch.bfloat16)
    inject(model, LNTuningConfig(target_modules=["embed_tokens", "norm"]))
    assert logits(model, batch("llama")).dtype == torch.bfloat16


def test_what_trains_is_close_to_exact_over_a_bf16_model() -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("llama").to(dtype)
        inject(model, LNTuningConfig())
        randomise(model)
        found.append(logits(model, batch("llama")).float())
    assert (found[0] - found[1]).norm() < 0.05 * found[0].norm()


@pytest.mark.parametrize(
    ("module", "words"), [(nn.BatchNorm1d(4), "running statistics"), (nn.LayerNorm(4, False), None), (nn.GELU(), None)]
)
def test_what_cannot_be_trained_is_refused(module: nn.Module, words: str | None) -> None:
    config = LNTuningConfig()
    if isinstance(module, nn.LayerNorm):
        module = nn.LayerNorm(4, elementwise_affine=False)
    with pytest.raises(AdapterError, match=words or "with nothing to train"):
        wrap(module, "norm", config)


def _adapted(kind: str, **settings: Any) -> tuple[Any, TrainableTokensConfig]:
    model, config = tiny(kind), TrainableTokensConfig(**{"token_indices": [79, 58], **settings})
    inject(model, config)
    set_trainable(model, True)
    return model, config


@pytest.mark.parametrize(
    ("kind", "targets", "layers"),
    [
        ("llama", ["model.embed_tokens"], ["model.embed_tokens"]),
        ("llama_tied", ["model.embed_tokens"], ["model.embed_tokens", "lm_head"]),
        ("gpt2", ["transformer.wte"], ["transformer.wte", "lm_head"]),
        ("bert", ["bert.embeddings.word_embeddings"], ["bert.embeddings.word_embeddings"]),
        ("t5", ["shared"], ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
    ],
)
def test_the_input_embedding_and_what_shares_it(kind: str, targets: list[str], layers: list[str]) -> None:
    model, config = _adapted(kind)
    assert config.target_modules == targets
    found = adapter_layers(model)
    assert list(found) == layers
    assert len({id(layer.trainable_tokens_delta) for layer in found.values()}) == 1
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 1


def test_rows_take_the_place_of_the_base_models() -> None:
    model, config = _adapted("llama_tied")
    base = tiny("llama_tied").get_input_embeddings().weight
    ours, theirs = logits(model, batch("llama_tied")), logits(tiny("llama_tied"), batch("llama_tied"))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)  # a product of other shape is summed otherwise
    randomise(model)
    rows = model.model.embed_tokens.trainable_tokens_delta
    embedded = model.get_input_embeddings()(torch.tensor([58, 5, 79]))
    assert torch.equal(embedded, torch.stack([rows[1], base[5], rows[0]]))
    merge(model, config)
    assert torch.equal(model.lm_head.weight[58], rows[1])
    assert torch.equal(model.lm_head.weight[5], base[5])
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_random_rows_differ_from_the_base_models() -> None:
    model, _ = _adapted("llama", init_weights=False)
    assert not torch.equal(logits(model, batch("llama")), logits(tiny("llama"), batch("llama")))


def test_weights_that_are_computed_at_each_read_are_different_ones() -> None:
    model = nn.ModuleDict({name: nn.Embedding(8, 4) for name in "abc"})
    for module in model.values():
        parametrize.register_parametrization(module, "weight", nn.Tanh())
    config = TrainableTokensConfig(target_modules=["a", "b", "c"], token_indices=[1])
    inject(model, config)
    assert set(adapter_layers(model)) == {"a", "b", "c"}


def _layer(base: nn.Module, **settings: Any) -> Any:
    layer = wrap(base, "x", GloraConfig(r=2, **settings)).requires_grad_(True)
    base.requires_grad_(False)
    return layer


def test_without_a_bias_only_the_weight_is_changed() -> None:
    layer = _layer(nn.Linear(5, 4, bias=False))
    assert [name for name in layer.own_tensors() if name[6] not in "AB"] == []
    assert sorted(layer.fixed) == ["glora_C.zeros", "glora_D.zeros", "glora_E.zeros"]


def test_there_is_something_to_train() -> None:
    with pytest.raises(AdapterError, match="nothing to train"):
        GloraConfig(config_A_B="none", config_C="none", config_D_E="none").check()
    settings: dict[str, Any] = {"config_A_B": "none", "target_modules": ["x"]}
    inject(nn.ModuleDict({"x": nn.Linear(5, 4)}), GloraConfig(**settings))
    with pytest.raises(AdapterError, match=r"config_A_B: .* have no bias"):
        inject(nn.ModuleDict({"x": nn.Linear(5, 4, bias=False)}), GloraConfig(**settings))
    model = nn.ModuleDict({"x": nn.Linear(5, 4, bias=False), "head": nn.Linear(4, 2)})
    inject(model, GloraConfig(**settings, modules_to_save=["head"]))
    assert any(value.requires_grad for value in model["head"].parameters())
