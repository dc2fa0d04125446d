"""DoRA computes what its paper says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_tiny import batch, logits, randomise, tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftcli.core.inject import inject, set_active, set_trainable
from peftcli.core.merge import merge
from peftcli.methods.beft import BeftConfig
from peftcli.methods.glora import GloraConfig
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.layers import wrap
from peftcli.methods.lora.variants import dora


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _filled(module: nn.Module, **settings: Any) -> Any:
    layer = wrap(module.requires_grad_(False), "x", LoraConfig(use_dora=True, **settings)).eval()
    randomise(layer)
    return layer


@pytest.mark.parametrize("build", [lambda: nn.Linear(5, 7), lambda: nn.Linear(5, 7, bias=False), lambda: Conv1D(7, 5)])
def test_a_linear_layer(build: Any) -> None:
    base = build()
    layer = _filled(base, r=2, lora_alpha=6)
    x, w = torch.randn(3, 5), base.weight.T if isinstance(base, Conv1D) else base.weight
    adapted = w + 3.0 * layer.lora_B.weight @ layer.lora_A.weight
    assert layer.lora_magnitude_vector.shape == (7,)
    expected = F.linear(
        x, layer.lora_magnitude_vector[:, None] * adapted / adapted.norm(dim=1, keepdim=True), base.bias
    )
    torch.testing.assert_close(layer(x), expected)


def test_an_embedding_has_a_length_for_each_column() -> None:
    base = nn.Embedding(9, 6)
    layer = _filled(base, r=2, lora_alpha=6)
    adapted = base.weight + 3.0 * (layer.lora_embedding_B @ layer.lora_embedding_A).T
    assert layer.lora_magnitude_vector.shape == (6,)
    expected = layer.lora_magnitude_vector * adapted / adapted.norm(dim=0)
    torch.testing.assert_close(layer(torch.arange(9)), expected)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_convolution(kind: Any) -> None:
    base = kind(3, 4, 3, padding=2, dilation=2, padding_mode="circular")
    layer = _filled(base, r=2, lora_alpha=2)
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
    layer = _filled(base, r=2, lora_alpha=2)
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
    layer = _filled(base, r=2, lora_dropout=0.5).train()
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
