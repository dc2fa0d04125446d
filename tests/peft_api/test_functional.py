"""PEFT's functions for adapters in a plain model."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from models_tiny import batch, labelled, logits, randomise, tiny
from promises import config_of
from torch import nn

import peftcli
from peftcli.core.inject import set_active, set_trainable
from peftcli.core.layer import adapter_layers
from peftcli.core.weights import adapter_state, file_tensors, load_state
from peftcli.errors import AdapterError
from peftcli.peft_api import functional

_SETTINGS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def _injected(lib: Any, **settings: Any) -> nn.Module:
    model = tiny("llama")
    torch.manual_seed(0)
    return lib.inject_adapter_in_model(lib.LoraConfig(**{**_SETTINGS, **settings}), model)


def _trained(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}, {"inference_mode": True}])
def test_a_plain_model_with_an_adapter_computes_and_trains_as_with_peft(settings: dict[str, Any]) -> None:
    here, there = _injected(peftcli, **settings), _injected(peft, **settings)
    assert type(here) is type(there) is type(tiny("llama"))
    assert _trained(here) == _trained(there)
    for model in (here, there):
        for value in model.parameters():
            if value.requires_grad:
                torch.nn.init.constant_(value, 0.1)
    torch.testing.assert_close(logits(here, batch("llama")), logits(there, batch("llama")), atol=1e-4, rtol=1e-4)
    if not settings:
        here(**labelled("llama")).loss.backward()
        assert all(value.grad is not None for value in here.parameters() if value.requires_grad)


def test_the_last_adapter_of_several_is_active_and_the_functions_switch_and_remove_them() -> None:
    model = _injected(peftcli, modules_to_save=["lm_head"])
    peftcli.inject_adapter_in_model(peftcli.LoraConfig(**_SETTINGS), model, "two")
    both = _trained(model)

    def enabled() -> set[str]:
        return {layer.adapter for layer in adapter_layers(model).values() if layer.enabled}

    assert enabled() == {"two"}
    functional.set_adapter(model, ["default", "two"])
    assert enabled() == {"default", "two"}
    functional.set_requires_grad(model, "two", requires_grad=False)
    assert 0 < _trained(model) < both
    functional.set_adapter(model, "two", inference_mode=True)
    with pytest.warns(UserWarning, match="two was active; now default is"):
        assert functional.delete_adapter(model, "two", "lora_") == ["default"]
    assert enabled() == {"default"}
    assert _trained(model) == _trained(_injected(peftcli, modules_to_save=["lm_head"]))
    with pytest.raises(AdapterError, match="Adapter two does not exist; there are: default"):
        functional.set_adapter(model, "two")
    assert functional.delete_adapter(model, "default") == []
    assert not adapter_layers(model)


def test_a_removed_adapter_that_was_not_active_leaves_the_others_disabled() -> None:
    model = _injected(peftcli)
    peftcli.inject_adapter_in_model(peftcli.LoraConfig(**_SETTINGS), model, "two")
    set_active(model, [])
    set_trainable(model, False)
    assert functional.delete_adapter(model, "two") == []
    assert _trained(model) == 0
    assert not any(layer.enabled for layer in adapter_layers(model).values())


def test_half_precision_weights_become_float32() -> None:
    model = _injected(peftcli).bfloat16()
    functional.cast_adapter_dtype(model, "default", autocast_adapter_dtype=False)
    assert {value.dtype for value in adapter_state(model).values()} == {torch.bfloat16}
    functional.cast_adapter_dtype(model, "default")
    assert {value.dtype for value in adapter_state(model).values()} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert _trained(model) == _trained(_injected(peftcli))


@pytest.mark.parametrize("method", ["lora", "ia3", "psoft"])
def test_tensors_name_the_modules_and_fill_an_empty_adapter(method: str) -> None:
    config, model = config_of(method, "llama"), tiny("llama")
    functional.inject_adapter_in_model(config, model)
    randomise(model)
    tensors = {name: value for name, value in adapter_state(model).items() if ".layers.0." in name}
    names = [name.removeprefix(config.file_prefix) for name in tensors]

    narrowed = tiny("llama")
    with pytest.warns(RuntimeWarning, match=r"only the config adapts model\.layers\.1\."):
        functional.inject_adapter_in_model(
            config_of(method, "llama"), narrowed, low_cpu_mem_usage=True, state_dict=names
        )
    assert adapter_state(narrowed).keys() == tensors.keys()
    assert all(value.is_meta for _, _, value in file_tensors(narrowed).values())
    load_state(narrowed, tensors)
    assert adapter_state(narrowed).keys() == tensors.keys()
    assert not any(value.is_meta for value in narrowed.parameters())
    assert torch.isfinite(logits(narrowed, batch("llama"))).all()


def test_trained_rows_are_no_target() -> None:
    config = peftcli.LoraConfig(r=2, target_modules=["k_proj"], trainable_token_indices=[10, 20])
    model = tiny("llama")
    functional.inject_adapter_in_model(config, model)
    found = tiny("llama")
    functional.inject_adapter_in_model(config, found, state_dict=adapter_state(model))
    assert adapter_state(found).keys() == adapter_state(model).keys()


def test_what_cannot_be_put_into_a_plain_model_is_an_error() -> None:
    model = tiny("llama")
    with pytest.raises(AdapterError, match="use get_peft_model"):
        functional.inject_adapter_in_model(peftcli.PromptTuningConfig(num_virtual_tokens=4), model)
    config = peftcli.LoraConfig(target_modules=[], target_parameters=["q_proj.weight"])
    with pytest.raises(AdapterError, match="cannot be found from a state_dict"):
        functional.inject_adapter_in_model(config, model, state_dict={"model.layers.0.self_attn.q_proj.lora_A.weight"})
    with pytest.raises(AdapterError, match="holds no tensor of a module of LlamaForCausalLM"):
        functional.inject_adapter_in_model(peftcli.LoraConfig(), model, state_dict={"lora_A.weight"})
    assert not adapter_layers(model)
    assert all(value.requires_grad for value in model.parameters())
