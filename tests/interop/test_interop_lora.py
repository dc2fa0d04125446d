"""LoRA: what we write PEFT reads, and the reverse, to the same logits."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora_cases import CASES
from models_tiny import DECODERS, batch, logits, tiny
from oracle import PEFTS_METHODS, file_of, loaded_by_peft, ours, saved_by_peft, theirs
from safetensors.torch import load_file, save_file
from torch import nn

from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import inject
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
from peftcli.methods import METHODS, config_from_dict
from peftcli.methods.lora import LoraConfig

BASE_WEIGHTS = {"embedding", "embedding-scaled", "head", "head-tied", "embedding-tied", "both-ends-tied"}
"""Cases for which PEFT also writes the base weights of the adapted embedding or head."""


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, str, dict[str, Any]]:
    return (request.param, *CASES[request.param])


@pytest.mark.grid(keep=8)
def test_what_we_write_peft_reads(case: tuple[str, str, dict[str, Any]], tmp_path: Path) -> None:
    _, kind, settings = case
    model, config = ours(kind, "lora", **settings)
    save_adapter(model, config, tmp_path)
    theirs_loaded = loaded_by_peft(kind, tmp_path)
    torch.testing.assert_close(logits(theirs_loaded, batch(kind)), logits(model, batch(kind)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(model, batch(kind)), logits(tiny(kind), batch(kind)), atol=1e-2)


@pytest.mark.grid(keep=8)
def test_what_peft_writes_we_read(case: tuple[str, str, dict[str, Any]], tmp_path: Path) -> None:
    _, kind, settings = case
    written = theirs(kind, "lora", **settings)
    saved_by_peft(written, tmp_path)
    model = tiny(kind)
    load_adapter(model, config_from_dict(read_config(tmp_path)), tmp_path)
    torch.testing.assert_close(logits(model, batch(kind)), logits(written, batch(kind)), atol=1e-5, rtol=1e-5)


@pytest.mark.grid(keep=8)
def test_names_shapes_and_counts_are_pefts(case: tuple[str, str, dict[str, Any]]) -> None:
    _, kind, settings = case
    model, _ = ours(kind, "lora", **settings)
    oracle = theirs(kind, "lora", **settings)
    warnings.filterwarnings("ignore", "Adapter 'default': .* have invalid shape")  # so it says of lora_B.bias
    here = {key: tuple(value.shape) for key, value in adapter_state(model).items()}
    there = {
        key: tuple(value.shape)
        for key, value in peft.get_peft_model_state_dict(oracle, save_embedding_layers=False).items()
        if ".modules_to_save." not in key and ".original_module." not in key  # written twice, with bias: all
    }
    assert here == there
    trained = {value.data_ptr(): value.numel() for value in oracle.parameters() if value.requires_grad}
    trainable = sum(trained.values())  # PEFT has tied adapters twice, over one memory
    assert sum(value.numel() for value in model.parameters() if value.requires_grad) == trainable


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("kind", DECODERS)
def test_default_and_all_linear_choose_pefts_modules(kind: str) -> None:
    for targets in (None, "all-linear"):
        model, _ = ours(kind, "lora", target_modules=targets)
        assert {name.partition(".lora_")[0] for name in adapter_state(model)} == {
            name.partition(".lora_")[0]
            for name in peft.get_peft_model_state_dict(theirs(kind, "lora", target_modules=targets))
        }


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize("name", sorted(BASE_WEIGHTS))
def test_base_weights_in_pefts_file_replace_the_models(name: str, tmp_path: Path) -> None:
    kind, settings = CASES[name]
    saved_by_peft(theirs(kind, "lora", **settings), tmp_path)
    _, tensors = file_of(tmp_path)
    [*base_names] = [key for key in tensors if key.endswith("base_layer.weight")]
    assert base_names, "PEFT writes no base weights any more; this test and its special case can go"
    tensors = {key: value + 0.5 if key in base_names else value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    model = tiny(kind)
    load_adapter(model, config_from_dict(read_config(tmp_path)), tmp_path)
    oracle = loaded_by_peft(kind, tmp_path)
    torch.testing.assert_close(logits(model, batch(kind)), logits(oracle, batch(kind)), atol=1e-5, rtol=1e-5)


def test_of_overlapping_patterns_the_first_counts_for_peft_too(tmp_path: Path) -> None:
    """PEFT sorts the patterns when it writes them, and then cannot read its own file; we keep their order."""
    patterns = {"self_attn.q_proj": 2, "layers.1.self_attn.q_proj": 6}
    model, config = ours("llama", "lora", rank_pattern=patterns)
    save_adapter(model, config, tmp_path)
    oracle = loaded_by_peft("llama", tmp_path)
    torch.testing.assert_close(logits(oracle, batch("llama")), logits(model, batch("llama")), atol=1e-5, rtol=1e-5)


def test_keys_of_newer_writers_are_accepted_while_they_are_off(tmp_path: Path) -> None:
    saved_by_peft(theirs("llama", "lora"), tmp_path)
    path = tmp_path / "adapter_config.json"
    newer = {"some_new_switch": False, "some_new_list": None, "some_new_table": {}, "peft_version": "9.9.9"}
    path.write_text(json.dumps(json.loads(path.read_text()) | newer))
    load_adapter(tiny("llama"), config_from_dict(read_config(tmp_path)), tmp_path)


def test_keys_of_a_newer_peft_that_are_on_are_told_and_those_known_to_matter_refused() -> None:
    values = {"peft_type": "LORA", "peft_version": "0.99.0.dev0", "some_new_switch": True}
    with pytest.warns(UserWarning, match="these are ignored. A newer PEFT may have written them: some_new_switch=True"):
        assert config_from_dict(values).r == 8
    for wrong in (
        {"peft_version": "0.21.2"},
        {"peft_version": None},
        {"megatron_config": True, "some_new_switch": False},
    ):
        with pytest.raises(AdapterError, match="=True is not supported"):
            config_from_dict({**values, **wrong})


@pytest.mark.parametrize("method", PEFTS_METHODS)
def test_every_setting_of_peft_is_one_here(method: str) -> None:
    config = METHODS[method].config_class()
    in_peft = dataclasses.fields(peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[config.peft_type]])
    assert {field.name for field in in_peft} <= {field.name for field in dataclasses.fields(config)}


def test_r_above_a_narrow_layers_side() -> None:
    """The gate of Qwen2-MoE's shared expert has one output."""
    model = nn.Sequential(nn.Linear(32, 1))
    assert inject(model, LoraConfig(r=16, target_modules=["0"])).trainable == 16 * (32 + 1)


def test_two_writes_of_equal_adapters_are_equal_bytes(tmp_path: Path) -> None:
    for folder, targets in (("a", ["v_proj", "q_proj"]), ("b", {"q_proj", "v_proj"})):
        model, config = ours("llama", "lora", target_modules=targets, task_type="CAUSAL_LM")
        save_adapter(model, config, tmp_path / folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_config_file_holds_what_readers_need(tmp_path: Path) -> None:
    model, config = ours("llama", "lora", task_type="CAUSAL_LM", base_model_name_or_path="org/base")
    save_adapter(model, config, tmp_path)
    written, _ = file_of(tmp_path)
    assert written == {
        "base_model_name_or_path": "org/base",
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "peft_version": written["peft_version"],
        "r": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    assert list(written) == sorted(written)


def test_gpt2_says_fan_in_fan_out(tmp_path: Path) -> None:
    model, config = ours("gpt2", "lora")
    save_adapter(model, config, tmp_path)
    assert file_of(tmp_path)[0]["fan_in_fan_out"] is True


def test_weights_are_written_as_they_were_trained(tmp_path: Path) -> None:
    model, config = ours("llama", "lora")
    save_adapter(model, config, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32}
