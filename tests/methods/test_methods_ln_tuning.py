"""LN tuning trains norms, whole, whatever the dtypes around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_tiny import batch, logits, randomise, tiny
from torch import nn
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P

from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.core.targets import wrap
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
from peftcli.methods._families import TARGETS
from peftcli.methods.ln_tuning import LNTuningConfig


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


def test_all_linear_names_no_norm() -> None:
    with pytest.raises(AdapterError, match="names no norm"):
        inject(tiny("llama"), LNTuningConfig(target_modules="all-linear"))


def test_disabled_layers_are_the_base_models() -> None:
    model = tiny("t5")
    inject(model, LNTuningConfig())
    assert all(type(layer).__name__ == "TrainedNorm" for layer in adapter_layers(model).values())
