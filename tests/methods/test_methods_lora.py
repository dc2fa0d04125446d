"""LoRA's layers compute what their formulas say, and keep what every adapter promises whatever their settings."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lora_cases import FURTHER
from models_tiny import VOCABULARY, batch, checkpoint_activations, ids, labelled, logits, randomise, tiny
from oracle import ours
from torch import nn
from trainkit import tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from peftcli.adapters.merge import merge_adapter
from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import disabled, inject, set_active, set_trainable, unload
from peftcli.core.layer import adapter_layers, base_module
from peftcli.core.merge import merge
from peftcli.core.weights import adapter_state, named_tensors
from peftcli.errors import AdapterError, PeftWarning
from peftcli.methods import config_from_dict
from peftcli.methods.beft import BeftConfig
from peftcli.methods.glora import GloraConfig
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.initialisations import EvaConfig, LoftQConfig
from peftcli.methods.lora.layers import wrap
from peftcli.methods.lora.lora import LoraEmbedding, LoraLayer
from peftcli.methods.lora.variants import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig, dora


def _filled(module: nn.Module, **settings: object) -> LoraLayer:
    layer = wrap(module, "x.proj", LoraConfig(**settings)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in layer.own_tensors().values():
            parameter.normal_()
    return layer


def test_an_embedding_adds_the_scaled_rows() -> None:
    base = nn.Embedding(11, 6)
    layer = _filled(base, r=2, lora_alpha=6)
    assert isinstance(layer, LoraEmbedding)
    tokens = ids(2, 4) % 11
    with torch.no_grad():
        rows = (layer.lora_embedding_B @ layer.lora_embedding_A).T[tokens]
        torch.testing.assert_close(layer(tokens), base(tokens) + 3.0 * rows)


def test_scaling() -> None:
    base = nn.Linear(16, 16)
    assert _filled(base, r=4, lora_alpha=8).scaling == 2
    assert _filled(base, r=4, lora_alpha=8, use_rslora=True).scaling == 4
    assert _filled(base, r=4, lora_alpha=8, rank_pattern={"proj": 2}).scaling == 4
    assert _filled(base, r=4, lora_alpha=8, alpha_pattern={"x.proj": 2}).scaling == 0.5
    assert _filled(base, r=4, rank_pattern={"proj": 2, "x.proj": 3}).r == 2  # the first that matches
    assert _filled(base, r=4, rank_pattern={"roj": 2}).r == 4


def test_how_a_and_b_start() -> None:
    base = nn.Linear(400, 300)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        kaiming, gaussian, free = (
            wrap(base, "x", LoraConfig(r=50, init_lora_weights=value))  # type: ignore[arg-type]
            for value in (True, "gaussian", False)
        )
    for layer in (kaiming, gaussian):
        assert not layer.lora_B.weight.any()
    assert free.lora_B.weight.any()
    assert kaiming.lora_A.weight.abs().max() <= math.sqrt(1 / 400)
    assert kaiming.lora_A.weight.std().item() == pytest.approx(math.sqrt(1 / 400 / 3), rel=0.05)
    assert gaussian.lora_A.weight.std().item() == pytest.approx(1 / 50, rel=0.05)
    embedding = wrap(nn.Embedding(9, 9), "x", LoraConfig(r=2))
    assert not embedding.lora_embedding_A.any()
    assert embedding.lora_embedding_B.any()


def test_dropout_works_in_training_only() -> None:
    layer = _filled(nn.Linear(64, 64), lora_dropout=0.5)
    x = torch.ones(1, 64)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_an_embedding_that_scales_what_it_looks_up_is_merged_right() -> None:
    model = tiny("gemma3")
    inject(model, LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False))
    (layer,) = adapter_layers(model).values()
    assert isinstance(layer, LoraEmbedding)
    tokens = torch.arange(1, 5)
    looked_up = layer.scaling * (layer.lora_embedding_B @ layer.lora_embedding_A).T[tokens]
    torch.testing.assert_close(
        layer(tokens) - base_module(layer)(tokens), math.sqrt(32) * looked_up, rtol=1e-3, atol=1e-4
    )


def test_the_adapter_reads_its_input_in_its_own_precision() -> None:
    layer = _filled(nn.Linear(8, 8).to(torch.bfloat16), r=2)
    assert layer.lora_A.weight.dtype == torch.float32
    assert layer(torch.randn(1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    double = _filled(nn.Linear(8, 8).double(), r=2)
    assert double.lora_A.weight.dtype == torch.float64


def test_autocast_computes_the_same_in_bf16() -> None:
    model = tiny("llama")
    inject(model, LoraConfig(init_lora_weights=False))
    exact = logits(model, batch("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model, batch("llama"))
    assert (found.float() - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_which_biases_are_trained(bias: str) -> None:
    model = tiny("gpt2")
    inject(model, LoraConfig(bias=bias, target_modules=["c_attn"]))  # type: ignore[arg-type]
    found = {name.removeprefix("base_model.model.") for name in adapter_state(model) if name.endswith("bias")}
    own = {f"transformer.h.{layer}.attn.c_attn.base_layer.bias" for layer in (0, 1)}
    if bias == "all":
        assert own < found
        assert len(found) == sum(name.endswith(".bias") for name, _ in tiny("gpt2").named_parameters())
    else:
        assert found == (own if bias == "lora_only" else set())


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _filled_dora(module: nn.Module, **settings: Any) -> Any:
    layer = wrap(module.requires_grad_(False), "x", LoraConfig(use_dora=True, **settings)).eval()
    randomise(layer)
    return layer


def test_an_embedding_has_a_length_for_each_column() -> None:
    base = nn.Embedding(9, 6)
    layer = _filled_dora(base, r=2, lora_alpha=6)
    adapted = base.weight + 3.0 * (layer.lora_embedding_B @ layer.lora_embedding_A).T
    assert layer.lora_magnitude_vector.shape == (6,)
    expected = layer.lora_magnitude_vector * adapted / adapted.norm(dim=0)
    torch.testing.assert_close(layer(torch.arange(9)), expected)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_convolution(kind: Any) -> None:
    base = kind(3, 4, 3, padding=2, dilation=2, padding_mode="circular")
    layer = _filled_dora(base, r=2, lora_alpha=2)
    dims = base.weight.ndim - 2
    x = torch.randn(2, 3, *[6] * dims)
    adapted = base.weight + layer.delta()
    length = layer.lora_magnitude_vector
    assert length.shape == (1, 4, *[1] * dims)
    weight = length.transpose(0, 1) * adapted / adapted.flatten(1).norm(dim=1).view(-1, *[1] * (dims + 1))
    torch.testing.assert_close(layer(x), base._conv_forward(x, weight, base.bias))


@pytest.mark.parametrize("module", [nn.Linear(5, 7), Conv1D(7, 5), nn.Conv2d(3, 4, 3), nn.Embedding(9, 6)])
def test_a_new_one_changes_nothing(module: nn.Module) -> None:
    layer = wrap(module, "x", LoraConfig(use_dora=True))
    inputs = {nn.Conv2d: torch.randn(1, 3, 5, 5), nn.Embedding: torch.arange(9)}
    x = inputs.get(type(module), torch.randn(3, 5))
    torch.testing.assert_close(layer(x), module(x))


def test_no_gradient_flows_through_the_norm() -> None:
    base = nn.Linear(5, 7)
    layer = _filled_dora(base, r=2, lora_alpha=2)
    x = torch.randn(3, 5)
    layer(x).square().sum().backward()
    found = layer.lora_B.weight.grad.clone()
    a, b = layer.lora_A.weight.detach(), layer.lora_B.weight.detach().requires_grad_()
    with torch.no_grad():
        norm = (base.weight + b @ a).norm(dim=1)
    y = F.linear(x, (layer.lora_magnitude_vector.detach() / norm)[:, None] * (base.weight.detach() + b @ a), base.bias)
    y.square().sum().backward()
    torch.testing.assert_close(found, b.grad)


def test_dropout_falls_on_what_differs_from_the_base_layer() -> None:
    base = nn.Linear(5, 7)
    layer = _filled_dora(base, r=2, lora_dropout=0.5).train()
    x = torch.randn(64, 5)
    torch.manual_seed(0)
    found = layer(x)
    torch.manual_seed(0)
    seen = layer.lora_dropout(x)
    factor = dora.factor(layer)
    expected = base(x) + (factor - 1) * F.linear(seen, base.weight) + factor * layer.update(seen)
    torch.testing.assert_close(found, expected)


def test_an_output_that_is_zero_in_the_base_model_is_no_division_by_zero() -> None:
    base = nn.Linear(5, 7)
    nn.init.zeros_(base.weight)
    layer = wrap(base, "x", LoraConfig(use_dora=True))
    x = torch.randn(3, 5)
    torch.testing.assert_close(layer(x), base(x))
    layer(x).sum().backward()
    assert all(value.grad.isfinite().all() for value in layer.own_tensors().values())


@pytest.mark.parametrize(
    "first",
    [LoraConfig(), LoraConfig(bias="lora_only"), BeftConfig(), GloraConfig(), GloraConfig(bias="glora_only")],
    ids=lambda config: f"{config.peft_type}-{config.bias}" if hasattr(config, "bias") else config.peft_type,
)
def test_among_several_adapters_it_takes_its_norm_with_the_models_own_weight(first: Any) -> None:
    model, names = tiny("qwen2"), ["q_proj", "k_proj"]
    doras = [LoraConfig(target_modules=names, use_dora=True, use_rslora=rslora) for rslora in (False, True)]
    configs = [replace(first, target_modules=names), *doras]
    for number, config in enumerate(configs):
        inject(model, config, str(number))
    set_trainable(model, True)
    randomise(model)
    model.eval()
    for active in (["0", "1", "2"], ["1", "2"], ["0", "2"]):
        set_active(model, active)
        expected = logits(model, batch("qwen2"))
        twin = tiny("qwen2")
        for number, config in enumerate(configs):
            inject(twin, config, str(number))
        twin.load_state_dict(model.state_dict())
        set_active(twin, active)
        merge(twin, *configs)
        torch.testing.assert_close(logits(twin, batch("qwen2")), expected, atol=1e-4, rtol=1e-4)


def test_a_usual_r_fits_a_layer_of_any_size() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    inject(model, LoraConfig(target_modules=["0"], rank_pattern={"^0": 24}))
    assert model[0].lora_A.weight.shape == (24, 1)


def test_a_bias_over_layers_without_one_is_a_warning() -> None:
    with pytest.warns(PeftWarning, match=r"lora_bias: model\.layers\.0.*q_proj has no bias .* cannot be merged"):
        inject(tiny("llama"), LoraConfig(lora_bias=True))


def test_a_parameter_of_the_model_itself_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_parameter("own", nn.Parameter(torch.ones(4, 4)))
    with pytest.raises(AdapterError, match="target_parameters: own is a parameter of Sequential itself"):
        inject(model, LoraConfig(target_parameters=["own"]))
    assert not adapter_layers(model)
    inject(nn.ModuleDict({"inner": model}), LoraConfig(target_parameters=["own"], r=2))


INPUTS = {"input_ids": ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "dora": ("llama", {"use_dora": True}, False),
    "dora-gpt2": ("gpt2", {"use_dora": True, "bias": "lora_only", "target_modules": ["c_attn"]}, False),
    "dora-embedding": ("llama_tied", {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}, True),
    "dora-pissa": ("llama", {"use_dora": True, "init_lora_weights": "pissa"}, False),
    "lora-bias": ("gpt2", {"lora_bias": True, "target_modules": ["c_attn"]}, False),
    "tokens": ("llama_tied", {"trainable_token_indices": [3, 7]}, False),
    "tokens-apart": ("llama_tied", {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [7]}}, True),
    "tied": ("llama_tied", {"ensure_weight_tying": True, "target_modules": ["lm_head", "q_proj"]}, False),
    "tied-saved": ("llama_tied", {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}, False),
    "replicated": ("llama", {"layer_replication": [[0, 2], [1, 2]]}, False),
    "replicated-turned": ("llama", {"layer_replication": [[1, 2], [0, 1]]}, False),
    "replicated-some": ("llama_tied", {"layer_replication": [[0, 2], [0, 2]], "layers_to_transform": [1]}, False),
    "kasa": ("llama", {"kasa_config": {}, "r": 4}, False),
    "experts": ("mixtral", {"target_parameters": ["gate_up_proj", "down_proj"]}, False),
}  # with whether the ends of the model are untied


@pytest.mark.grid
@pytest.mark.parametrize("name", CASES)
def test_the_merged_model_computes_what_base_and_adapter_compute(name: str, tmp_path: Path) -> None:
    kind, settings, unties = CASES[name]
    base, folder, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    tiny(kind).save_pretrained(base)
    tokenizer().save_pretrained(base)
    targets = {"target_modules": ["q_proj", "v_proj"]} if "target_parameters" not in settings else {}
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(base_model_name_or_path=str(base), task_type="CAUSAL_LM", **{**targets, **settings})
    inject(model, config)
    set_trainable(model, True)
    randomise(model)
    save_adapter(model, config, folder)
    again = AutoModelForCausalLM.from_pretrained(base)
    load_adapter(again, config_from_dict(read_config(folder)), folder)
    expected = logits(again.eval(), INPUTS)
    assert expected.shape[-1] == VOCABULARY
    made = merge_adapter(str(folder), merged)
    found = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(logits(found.eval(), INPUTS), expected, atol=1e-4, rtol=1e-4)
    assert made["untied"] == unties
    tied = AutoConfig.from_pretrained(base).tie_word_embeddings and not unties
    assert AutoConfig.from_pretrained(merged).tie_word_embeddings == tied
    assert found.config.num_hidden_layers == model.config.num_hidden_layers


@pytest.fixture(params=FURTHER)
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return FURTHER[request.param]


@pytest.mark.grid(keep=6)
def test_disabled_and_unloaded_it_is_the_base_model(case: tuple[str, dict[str, Any]]) -> None:
    kind, settings = case
    model, _ = ours(kind, "lora", **settings)
    base = tiny(kind)
    expected, found = logits(base, batch(kind)), logits(model, batch(kind))
    assert not torch.allclose(found, expected, atol=1e-3)
    if "layer_replication" not in settings:
        with disabled(model):
            assert torch.equal(logits(model, batch(kind)), expected)
    unload(model)
    assert torch.equal(logits(model, batch(kind)), expected)
    assert list(model.state_dict()) == list(base.state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]


@pytest.mark.grid(keep=6)
def test_merged_it_computes_the_same(case: tuple[str, dict[str, Any]]) -> None:
    kind, settings = case
    model, config = ours(kind, "lora", **settings)
    expected = logits(model, batch(kind))
    merge(model, config)
    assert not adapter_layers(model)
    torch.testing.assert_close(logits(model, batch(kind)), expected, atol=1e-4, rtol=1e-4)
    merged = list(model.parameters())
    assert len({value.data_ptr() for value in merged}) == len(merged)


@pytest.mark.grid(keep=4)
def test_a_copy_is_a_model_of_its_own(case: tuple[str, dict[str, Any]]) -> None:
    kind, settings = case
    model, _ = ours(kind, "lora", **settings)
    expected = logits(model, batch(kind))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batch(kind)), expected)
    randomise(twin, seed=9)
    assert torch.equal(logits(model, batch(kind)), expected)
    assert not torch.equal(logits(twin, batch(kind)), expected)
    unload(twin)
    assert torch.equal(logits(model, batch(kind)), expected)


@pytest.mark.grid(keep=6)
def test_only_its_tensors_get_gradients_and_each_does(case: tuple[str, dict[str, Any]]) -> None:
    kind, settings = case
    model, _ = ours(kind, "lora", **settings)
    model.train()(**labelled(kind)).loss.backward()
    trained = {id(parameter) for _, _, parameter in named_tensors(model).values()}
    found = {id(value) for value in model.parameters() if value.grad is not None and value.grad.abs().sum() > 0}
    assert found == trained


def _gradients(model: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**labelled(kind)).loss.backward()
    return {name: parameter.grad.clone() for name, (_, _, parameter) in named_tensors(model).items()}


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["experts", "replicated", "tokens-llama_tied", "dora-gpt2", "tied-head", "lora-bias"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    kind, settings = FURTHER[name]
    model, _ = ours(kind, "lora", **settings)
    expected = _gradients(model.train(), kind)
    checkpoint_activations(model, reentrant=reentrant)
    if reentrant:
        model.enable_input_require_grads()
    for tensor, gradient in _gradients(model, kind).items():
        torch.testing.assert_close(gradient, expected[tensor], atol=1e-4, rtol=1e-4)


@pytest.mark.grid(keep=3)
def test_a_bf16_base_carries_an_fp32_adapter(case: tuple[str, dict[str, Any]]) -> None:
    kind, settings = case
    exact, _ = ours(kind, "lora", **settings)
    model: nn.Module = tiny(kind).to(torch.bfloat16)
    inject(model, LoraConfig(**settings))
    set_trainable(model, True)
    randomise(model)
    assert {parameter.dtype for _, _, parameter in named_tensors(model).values()} == {torch.float32}
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in batch(kind).items()}
    found, expected = logits(model.eval(), inputs), logits(exact, batch(kind))
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        (EvaConfig, {"rho": -1}),
        (LoftQConfig, {"loftq_bits": 3}),
        (KasaConfig, {"beta": -1}),
        (KasaConfig, {"beta": float("nan")}),
        (MontecloraConfig, {"num_samples": 0}),
        (VeloraConfig, {"scale": 0}),
        (BdLoraConfig, {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["q_proj"]}),
    ],
)
def test_a_section_is_checked_when_it_is_made(section: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(AdapterError) as caught:
        section(**wrong)
    assert caught.value.key == f"{section.key}.{list(wrong)[-1]}"
