"""LoRA made of other adapters."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import batch, logits, randomise, tiny
from peft.tuners.lora import intruders
from promises import config_of
from torch import nn

import peftcli
from peftcli.core.layer import adapter_layers
from peftcli.errors import AdapterError, AdapterTypeError
from peftcli.peft_api import lora
from peftcli.peft_api.namespaces import TUNER_MODELS


def _adapted(kind: str, method: str, **settings: Any) -> Any:
    model = peftcli.get_peft_model(tiny(kind), getattr(peftcli, method)(**settings))
    randomise(model)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "method", "settings", "r"),
    [
        ("llama", "LoKrConfig", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 32),
        ("llama", "OFTConfig", {"target_modules": ["q_proj"], "oft_block_size": 4}, 32),
        ("llama", "LoraConfig", {"use_dora": True, "target_modules": r".*\.q_proj"}, 32),
        ("gpt2", "MissConfig", {"r": 2}, 2),
        ("gpt2", "IA3Config", {"target_modules": ["mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}, 32),
    ],
)
@pytest.mark.filterwarnings("ignore:default is LoRA already")
def test_a_full_r_computes_the_same_here_and_in_peft(
    kind: str, method: str, settings: dict[str, Any], r: int, tmp_path: Path
) -> None:
    model = _adapted(kind, method, **settings)
    assert model.supports_lora_conversion()
    peftcli.save_as_lora(tmp_path, model, r)
    expected = logits(model, batch(kind))
    assert not torch.allclose(expected, logits(tiny(kind), batch(kind)), atol=1e-2)
    assert all(layer.enabled for layer in adapter_layers(model).values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it could not merge a tied head
        for lib in (peftcli, peft):
            again = lib.PeftModel.from_pretrained(tiny(kind), tmp_path).eval()
            torch.testing.assert_close(logits(again, batch(kind)), expected, atol=2e-3, rtol=1e-3)


_CANNOT = ("adaption_prompt", "beft", "lily", "ln_tuning", "trainable_tokens", "xlora")


@pytest.mark.grid(keep=3)
@pytest.mark.filterwarnings("ignore:default is LoRA already")
@pytest.mark.parametrize("method", [*TUNER_MODELS.values()])
def test_every_method_that_adds_to_weights_becomes_lora(method: str) -> None:
    config = config_of(method, "llama")
    if method == "adalora":
        config.total_step = 10
    model = peftcli.get_peft_model(tiny("llama"), config)
    randomise(model)
    model.eval()
    assert model.supports_lora_conversion() == (method not in _CANNOT)
    if method in _CANNOT:
        return
    made, tensors = peftcli.convert_to_lora(model, 1.0)
    again = peftcli.get_peft_model(tiny("llama"), made).eval()
    peftcli.set_peft_model_state_dict(again, tensors)
    expected = logits(model, batch("llama"))
    torch.testing.assert_close(logits(again, batch("llama")), expected, atol=1e-3 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("rank", [3, 0.5, 0.9])
def test_the_config_and_the_update_are_pefts(rank: float) -> None:
    settings = {"r": 16, "target_modules": ["q_proj", "down_proj"]}
    here, there = (
        _adapted("llama", "LoHaConfig", **settings),
        peft.get_peft_model(tiny("llama"), peft.LoHaConfig(**settings)),
    )
    peft.set_peft_model_state_dict(there, peftcli.get_peft_model_state_dict(here))
    config, tensors = peftcli.convert_to_lora(here, rank)
    expected_config, expected = peft.convert_to_lora(there, rank)
    assert (config.r, config.lora_alpha, config.rank_pattern) == (
        expected_config.r,
        expected_config.lora_alpha,
        expected_config.rank_pattern,
    )
    assert tensors.keys() == expected.keys()
    for name in [name for name in tensors if "lora_A" in name]:
        found, right = (each[name.replace("lora_A", "lora_B")] @ each[name] for each in (tensors, expected))
        torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:default is LoRA already")
def test_a_name_that_ends_another_ones_keeps_its_own_r(tmp_path: Path) -> None:
    net = nn.Sequential(OrderedDict(proj=nn.Linear(8, 8), body=nn.Sequential(OrderedDict(proj=nn.Linear(8, 8)))))
    config = peftcli.LoraConfig(target_modules=["proj"], r=2, rank_pattern={"body.proj": 4})
    model, x = peftcli.get_peft_model(copy.deepcopy(net), config), torch.randn(2, 8)
    randomise(model)
    peftcli.save_as_lora(tmp_path, model, 1.0)
    again = peftcli.PeftModel.from_pretrained(net, tmp_path)
    torch.testing.assert_close(again(x), model(x), atol=1e-4, rtol=1e-4)


def test_a_plain_model_has_plain_names_and_each_adapter_its_own_update() -> None:
    model = peftcli.inject_adapter_in_model(peftcli.LoKrConfig(r=2, target_modules=["q_proj"]), tiny("llama"))
    peftcli.inject_adapter_in_model(peftcli.LoKrConfig(r=4, target_modules=["q_proj"]), model, "two")
    randomise(model)
    config, tensors = peftcli.convert_to_lora(model, 32, adapter_name="two")
    assert config.target_modules == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    merged = tiny("llama")
    for name in config.target_modules:
        merged.get_submodule(name).weight.data += tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    torch.testing.assert_close(logits(model, batch("llama")), logits(merged, batch("llama")), atol=1e-3, rtol=1e-3)


def test_what_is_no_update_of_a_weight_is_an_error() -> None:
    lokr = _adapted("llama", "LoKrConfig", target_modules=["q_proj"])
    for rank, problem in {0: "at least 1", 1.5: "above 0 and at most 1", 33: "33 is more than 32"}.items():
        with pytest.raises(AdapterError, match=problem):
            peftcli.convert_to_lora(lokr, rank)
    biased = _adapted("gpt2", "C3AConfig", target_modules=["c_proj"], block_size=4, bias="c3a_only")
    assert not biased.supports_lora_conversion()
    with pytest.raises(AdapterError, match=r"trains the bias of transformer\.h\.0"):
        peftcli.convert_to_lora(biased, 2)
    for model in (tiny("llama"), _adapted("llama", "LNTuningConfig"), _adapted("gpt2", "BeftConfig")):
        with pytest.raises(AdapterTypeError):
            peftcli.convert_to_lora(model, 2)


@pytest.mark.parametrize("epsilon", [0.5, 0.9])
def test_intruders_are_taken_back_as_by_peft(epsilon: float) -> None:
    settings = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]}
    here, there = (
        _adapted("llama", "LoraConfig", **settings),
        peft.get_peft_model(tiny("llama"), peft.LoraConfig(**settings)),
    )
    peft.set_peft_model_state_dict(there, peftcli.get_peft_model_state_dict(here))
    lines: list[str] = []
    lora.reduce_intruder_dimension(here, threshold_epsilon=epsilon, logging_sink=lines.append)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        intruders.reduce_intruder_dimension(there, threshold_epsilon=epsilon, logging_sink=None)
    assert here.active_adapters == ["intruder_reduced"]
    assert len(lines) == 4
    torch.testing.assert_close(logits(here, batch("llama")), logits(there, batch("llama")), atol=1e-3, rtol=1e-3)
    before = logits(here, batch("llama"))
    here.set_adapter("default")
    assert not torch.allclose(logits(here, batch("llama")), before, atol=1e-3)


def test_intruders_of_other_layers_and_methods() -> None:
    model = _adapted("llama", "LoraConfig", target_modules=["embed_tokens"], r=4)
    lora.reduce_intruder_dimension(model, threshold_epsilon=2.0, mitigation_lambda=1.0, logging_sink=None)
    reduced = logits(model, batch("llama"))
    model.set_adapter("default")  # nothing is taken back, so only A and B are others
    torch.testing.assert_close(reduced, logits(model, batch("llama")), atol=1e-3, rtol=1e-3)
    for other, problem in {
        _adapted("llama", "MissConfig", r=4): "works for LORA, not MISS",
        _adapted("llama", "LoraConfig", use_dora=True): "plain LoRA only",
        _adapted("llama", "LoraConfig", kasa_config=peftcli.KasaConfig()): "kasa_config: works for plain LoRA only",
    }.items():
        with pytest.raises(AdapterError, match=problem):
            lora.reduce_intruder_dimension(other)
        assert list(other.peft_config) == ["default"]
