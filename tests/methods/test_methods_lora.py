"""LoRA's layers compute what their formulas say."""

from __future__ import annotations

import math

import pytest
import torch
from models_tiny import batch, ids, logits, tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers, base_module
from peftcli.core.weights import adapter_state
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.layers import wrap
from peftcli.methods.lora.lora import LoraEmbedding, LoraLayer, LoraLinear


def _filled(module: nn.Module, **settings: object) -> LoraLayer:
    layer = wrap(module, "x.proj", LoraConfig(**settings)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in layer.own_tensors().values():
            parameter.normal_()
    return layer


@pytest.mark.parametrize("build", [lambda: nn.Linear(5, 7), lambda: nn.Linear(5, 7, bias=False), lambda: Conv1D(7, 5)])
def test_a_linear_layer_adds_the_scaled_product(build: object) -> None:
    base = build()  # type: ignore[operator]
    layer = _filled(base, r=3, lora_alpha=12)
    assert isinstance(layer, LoraLinear)
    a, b, x = layer.lora_A.weight, layer.lora_B.weight, torch.randn(2, 4, 5)
    assert a.shape == (3, 5)
    assert b.shape == (7, 3)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), base(x) + 4.0 * (x @ a.T) @ b.T)
        plain = torch.randn(5, 7) if isinstance(base, Conv1D) else torch.randn(7, 5)
        base.weight.copy_(plain)
        assert layer.merged_tensors({"weight": plain})["weight"].shape == plain.shape


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
