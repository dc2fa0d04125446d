"""Whatever LoRA's settings, the adapter keeps what every adapter promises."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lora_cases import FURTHER
from models_tiny import batch, checkpoint_activations, labelled, logits, randomise, tiny
from oracle import ours
from torch import nn

from peftcli.core.inject import disabled, inject, set_trainable, unload
from peftcli.core.layer import adapter_layers
from peftcli.core.merge import merge
from peftcli.core.weights import named_tensors
from peftcli.errors import AdapterError
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.initialisations import EvaConfig, LoftQConfig
from peftcli.methods.lora.variants import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig


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


@pytest.mark.parametrize("wrong", [{"r": "8"}, {"lora_alpha": "16"}, {"lora_dropout": "0.1"}, {"use_dora": "yes"}])
def test_a_text_is_no_number(wrong: dict[str, str]) -> None:
    [(key, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"expected .*, found {value!r}") as caught:
        LoraConfig(**wrong)  # type: ignore[arg-type]
    assert caught.value.key == key
