"""LoRA on convolutions with groups, attention and the weights of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_tiny import randomise
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from peftcli.core.inject import disabled, inject, set_active, set_trainable, unload
from peftcli.core.layer import adapter_layers
from peftcli.core.merge import merge, merge_in_place
from peftcli.core.weights import adapter_state, named_tensors
from peftcli.errors import AdapterError
from peftcli.methods.ia3 import IA3Config
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.layers import wrap


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _filled(module: nn.Module, **settings: Any) -> Any:
    layer = wrap(module.requires_grad_(False), "x.proj", LoraConfig(**settings)).eval()
    randomise(layer)
    return layer


def _adapted(model: nn.Module, **settings: Any) -> tuple[Any, LoraConfig]:
    config = LoraConfig(**settings)
    inject(model, config)
    set_trainable(model, True)
    randomise(model)
    return model.eval(), config


def test_a_convolution_with_groups_reads_all_channels_and_says_why_it_is_not_merged() -> None:
    base = nn.Conv2d(4, 6, 3, groups=2, dilation=2)
    layer = _filled(base, r=4, lora_alpha=8)
    a, b = layer.lora_A.weight, layer.lora_B.weight
    assert a.shape == (4, 4, 3, 3)
    assert b.shape == (6, 2, 1, 1)
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(layer(x), base(x) + 2 * F.conv2d(F.conv2d(x, a, dilation=2), b, groups=2))
    with pytest.raises(AdapterError, match=r"convolution with 2 groups cannot be merged: .* channels of other groups"):
        layer.folded(dict(base.named_parameters()))
    with pytest.raises(AdapterError, match=r"use_dora: is not supported for x\.proj, a convolution with groups"):
        _filled(base, r=4, use_dora=True)
    with pytest.raises(AdapterError, match=r"r: 3 is not a multiple of x.proj's 2 groups"):
        _filled(base, r=3)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("settings", [{}, {"lora_bias": True}])
def test_a_convolution_with_groups_is_merged_where_its_update_keeps_to_them(groups: int, settings: Any) -> None:
    base = nn.Conv2d(4, 8, 3, groups=groups, padding=1, padding_mode="reflect")
    layer = _filled(base, r=4, **settings)
    with torch.no_grad():  # each group's rows of A read the group's channels only
        rows = layer.lora_A.weight.view(groups, 4 // groups, groups, 4 // groups, 3, 3)
        rows *= torch.eye(groups).view(groups, 1, groups, 1, 1, 1)
    x = torch.randn(2, 4, 9, 9)
    tensors = {**dict(base.named_parameters()), **layer.folded(dict(base.named_parameters()))}
    torch.testing.assert_close(torch.func.functional_call(base, tensors, (x,)), layer(x), atol=1e-4, rtol=1e-4)
    nn.init.zeros_(layer.lora_B.weight)
    assert torch.equal(layer.folded(dict(base.named_parameters()))["weight"], base.weight)


def test_the_padding_of_an_embedding_is_not_trained() -> None:
    layer = _filled(nn.Embedding(6, 4, padding_idx=3), r=2)
    layer(torch.tensor([[3, 1], [3, 5]])).sum().backward()
    assert layer.lora_embedding_A.grad.any(0).tolist() == [False, True, False, False, False, True]


class _Encoder(nn.Module):
    """PyTorch's own encoder."""

    def __init__(self, layers: int = 2, **settings: Any):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **settings)
        self.encoder = nn.TransformerEncoder(layer, layers)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.encoder(x, **kwargs)


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"need_weights": True, "average_attn_weights": False},
    "padding": {"key_padding_mask": torch.tensor([[False] * 4 + [True], [False] * 5])},
    "causal": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(5), "is_causal": True},
}


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("inputs", ATTENTION.values(), ids=ATTENTION)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", [{}, {"bias": False}, {"batch_first": True}, {"add_bias_kv": True}])
def test_attention_computes_as_with_its_weights_changed(
    inputs: dict[str, Any], training: bool, build: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    base = nn.MultiheadAttention(16, 4, **build)
    layer = _filled(base, r=3, lora_alpha=6).train(training)
    assert layer.lora_B.weight.shape == (48, 3)
    x = torch.randn(2, 5, 16) if base.batch_first else torch.randn(5, 2, 16)
    found, weights = layer(x, x, x, **inputs)
    tensors = layer.merged_tensors(dict(base.named_parameters()))
    expected, expected_weights = torch.func.functional_call(base, tensors, (x, x, x), inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(weights, expected_weights)
    product = 2.0 * layer.lora_B.weight @ layer.lora_A.weight
    torch.testing.assert_close(tensors["in_proj_weight"], base.in_proj_weight + product)
    out = 4.0 * layer.out.lora_B.weight @ layer.out.lora_A.weight  # twice, as PEFT's files mean it
    torch.testing.assert_close(tensors["out_proj.weight"], base.out_proj.weight + out)
    with disabled(layer):
        assert torch.equal(layer(x, x, x, **inputs)[0], base(x, x, x, **inputs)[0])


def test_attention_keeps_what_models_read_of_it() -> None:
    layer = _filled(nn.MultiheadAttention(16, 4, dropout=0.25, batch_first=True))
    assert (layer.dropout, layer.num_heads, layer.batch_first) == (0.25, 4, True)


def test_attention_that_lora_cannot_adapt_is_refused() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 4)})
    with pytest.raises(AdapterError, match=r"attention adapts attention\.out_proj too"):
        inject(model, LoraConfig(target_modules=["attention", "out_proj"]))
    for settings in ({"target_modules": ["out_proj"]}, {"target_modules": ["last"], "modules_to_save": ["out_proj"]}):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 4), "last": nn.Linear(16, 16)})
        inject(model, LoraConfig(target_modules=["attention"]))
        with pytest.raises(AdapterError, match=r"attention adapts attention\.out_proj too"):
            inject(model, LoraConfig(**settings), "b")
        assert {layer.adapter for layer in adapter_layers(model).values()} == {"default"}
    with pytest.raises(AdapterError, match="keys or values of another width"):
        _filled(nn.MultiheadAttention(16, 4, kdim=8))
    for settings in ({"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"lora_dropout": 0.1}):
        with pytest.raises(AdapterError, match=r"is not supported for x\.proj, in a MultiheadAttention"):
            _filled(nn.MultiheadAttention(16, 4), **settings)


def test_attention_is_adapted_beside_another_adapters_trained_biases() -> None:
    model, x = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "last": nn.Linear(8, 8)}), torch.randn(3, 2, 8)
    configs = [LoraConfig(target_modules=["attention"]), LoraConfig(target_modules=["last"], bias="all")]
    for name, config in zip("ab", configs, strict=True):
        inject(model, config, name)
    randomise(model)
    state = list(model.state_dict())
    with torch.no_grad():
        found = model["attention"](x, x, x)[0]
        assert list(model.state_dict()) == state
        merge(model, *configs)
        torch.testing.assert_close(model["attention"](x, x, x)[0], found, atol=1e-5, rtol=1e-5)


def test_a_weight_that_two_layers_have_changed_is_taken_back() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    weight = model["attention"].out_proj.weight
    inject(model, LoraConfig(target_modules=["attention"]), "a")
    inject(model, IA3Config(target_modules=["out_proj"], feedforward_modules=[], inference_mode=True), "b")
    randomise(model)
    merge_in_place(model).undo()
    assert model["attention"].base_layer.out_proj.base_layer.weight is weight


def test_a_weight_inside_a_module_that_another_adapter_trains_in_full_is_that_of_one_adapter() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "last": nn.Linear(8, 8)})
    inject(model, LoraConfig(target_modules=["last"], modules_to_save=["attention"]), "a")
    inject(model, LoraConfig(target_modules=["attention"]), "b")
    with pytest.raises(AdapterError, match="b replaces attention, which a changes too; only one of them can be"):
        set_active(model, ["a", "b"])


TARGETS = [["self_attn"], ["linear1"], ["out_proj", "linear2"], "all-linear"]


@pytest.mark.grid(keep=3)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("padded", [False, True])
def test_pytorchs_encoder_does_not_pass_by_its_adapter(targets: Any, padded: bool) -> None:
    model = _Encoder().eval().requires_grad_(False)
    x, mask = torch.randn(2, 5, 16), torch.tensor([[False] * 4 + [True], [False] * 5])
    inputs = {"src_key_padding_mask": mask} if padded else {}
    kept = ~mask if padded else torch.ones_like(mask)
    before = model(x, **inputs)[kept]
    model, config = _adapted(model, target_modules=targets)
    trained = model(x, **inputs)
    trained[kept].square().sum().backward()
    assert all(value.grad.abs().sum() > 0 for _, _, value in named_tensors(model).values())
    with torch.no_grad():
        found = model(x, **inputs)[kept]
    torch.testing.assert_close(found, trained[kept])
    assert not torch.allclose(found, before, atol=1e-2)
    with disabled(model):
        torch.testing.assert_close(model(x, **inputs)[kept], before)
    merge(model, config)
    torch.testing.assert_close(model(x, **inputs)[kept], found, atol=1e-4, rtol=1e-4)


def test_pytorchs_encoder_is_as_fast_as_before_once_its_adapter_is_gone() -> None:
    model = _Encoder()
    layer = model.encoder.layers[0]
    before = (model.encoder.use_nested_tensor, layer.activation_relu_or_gelu)
    _adapted(model, target_modules=["linear1"])
    assert not model.encoder.use_nested_tensor
    unload(model)
    assert (model.encoder.use_nested_tensor, layer.activation_relu_or_gelu) == before


_SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {
    "mixtral": MixtralConfig(**_SHAPE, num_local_experts=3),
    "qwen3_moe": Qwen3MoeConfig(**_SHAPE, num_experts=3, moe_intermediate_size=12),
    "gpt_oss": GptOssConfig(**_SHAPE, num_local_experts=3),
    "llama4": Llama4TextConfig(**_SHAPE, num_local_experts=3, intermediate_size_mlp=20),
}


def _experts(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(EXPERTS[name], attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("name", EXPERTS)
def test_each_expert_has_a_pair_of_its_own(name: str) -> None:
    model, _ = _adapted(_experts(name), target_parameters=["gate_up_proj", "down_proj"], r=2, lora_alpha=6)
    first = next(module for path, module in model.named_modules() if path.endswith("experts.base_layer"))
    [parameter] = first.adapted
    weight = getattr(first.base_layer, parameter)
    a, b = first.lora_A.weight, first.lora_B.weight
    for expert in range(3):
        product = 3.0 * b.view(len(b), 2, 3)[:, :, expert] @ a[2 * expert : 2 * expert + 2]
        expected = weight[expert] + (product.T if name == "gpt_oss" else product)
        torch.testing.assert_close(first.with_delta(parameter, weight)[expert], expected)


@pytest.mark.grid(each="name")
@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_are_merged_right(name: str, implementation: str) -> None:
    tokens = torch.arange(2, 14).view(2, 6)
    model = _experts(name)
    before = model(tokens).logits
    if name != "llama4":  # which knows one implementation
        model.set_experts_implementation(implementation)
    model, config = _adapted(model, target_parameters=["gate_up_proj", "down_proj"])
    expected = model(tokens).logits
    assert not torch.allclose(before, expected, atol=1e-2)
    expected.square().sum().backward()
    assert all(value.grad.abs().sum() > 0 for _, _, value in named_tensors(model).values())
    merge(model, config)
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=1e-4)


def test_several_adapters_on_experts_add_up() -> None:
    tokens = torch.arange(2, 14).view(2, 6)
    model, configs = _experts("mixtral"), []
    for name, parameters in (("a", ["gate_up_proj", "down_proj"]), ("b", ["down_proj"])):
        configs.append(LoraConfig(target_parameters=parameters, init_lora_weights=False))
        inject(model, configs[-1], name)
    assert set(adapter_state(model, "b")) == {
        f"base_model.model.model.layers.{layer}.mlp.experts.lora_{part}.weight" for layer in (0, 1) for part in "AB"
    }
    expected = model(tokens).logits
    merge(model, *configs)
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_weights_of_experts_need_no_other_target() -> None:
    model, config = _adapted(_experts("mixtral"), target_parameters=["down_proj"])
    assert {name.split(".")[-3] for name in adapter_state(model)} == {"experts"}
    assert config.target_modules == set()
    assert LoraConfig(target_parameters=["down_proj"]).usual_targets("mixtral") == []
