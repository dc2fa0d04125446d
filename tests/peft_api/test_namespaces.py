"""PEFT's modules and names, found by the same imports."""

from __future__ import annotations

import importlib

import peft
import pytest
import torch
from models_tiny import tiny
from oracle import PEFTS_METHODS

import peftcli
import peftcli.peft_api
from peftcli.methods import METHODS
from peftcli.peft_api import for_libraries, mapping, training
from peftcli.peft_api.namespaces import NAMESPACES


def test_every_public_name_is_there_under_both_packages() -> None:
    for name in peftcli.PEFT_NAMES:
        assert getattr(peftcli, name) is getattr(peftcli.peft_api, name)
    assert set(peftcli.peft_api.__all__) <= set(dir(peftcli.peft_api))
    with pytest.raises(AttributeError, match="no attribute 'get_peft_mode'"):
        _ = peftcli.peft_api.get_peft_mode


def test_every_module_is_one_of_pefts() -> None:
    own = {f"tuners.{name}" for name in METHODS.keys() - PEFTS_METHODS}
    for path in NAMESPACES:
        if path.removesuffix(".config").removesuffix(".model") not in own:
            importlib.import_module(f"peft.{path}")
        importlib.import_module(f"peftcli.peft_api.{path}")


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("auto", "AutoPeftModelForCausalLM"),
        ("config", "PeftConfig"),
        ("functional", "inject_adapter_in_model set_adapter get_peft_model_state_dict"),
        ("mapping", "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_TUNER_MAPPING get_peft_config inject_adapter_in_model"),
        ("mapping_func", "get_peft_model"),
        ("peft_model", "PeftModel PeftModelForCausalLM get_layer_status PeftConfig get_peft_model_state_dict PeftType"),
        ("tuners", "LoraConfig IA3Config PrefixTuningConfig"),
        ("tuners.adamss.asa_callback", "AdamssAsaCallback"),
        ("tuners.cartridge.utils", "initialize_kv_prefix_from_text compose_cartridge_adapters"),
        (
            "tuners.lora",
            "LoraConfig LoraLayer Linear LoraModel EvaConfig ArrowConfig create_arrow_model convert_to_lora",
        ),
        ("tuners.lora.corda", "preprocess_corda"),
        ("tuners.lora.layer", "LoraLayer"),
        ("tuners.multitask_prompt_tuning", "MultitaskPromptTuningConfig MultitaskPromptTuningInit"),
        ("tuners.ia3", "IA3Config IA3Model"),
        ("tuners.xlora.model", "XLoraModel"),
        ("tuners.tuners_utils", "BaseTunerLayer BaseTuner set_adapter"),
        ("utils", "PeftError TaskType PeftType infer_device SAFETENSORS_WEIGHTS_NAME CONFIG_NAME ModulesToSaveWrapper"),
        ("utils.other", "prepare_model_for_kbit_training fsdp_auto_wrap_policy ModulesToSaveWrapper"),
        ("utils.save_and_load", "get_peft_model_state_dict set_peft_model_state_dict"),
    ],
)
def test_the_names_that_scripts_import_are_where_peft_has_them(path: str, names: str) -> None:
    here, there = (importlib.import_module(f"{root}.{path}") for root in ("peftcli.peft_api", "peft"))
    missing = [name for name in names.split() if not (hasattr(here, name) and hasattr(there, name))]
    assert not missing
    assert not hasattr(here, "no_such_name")


def test_all_names_of_a_module_are_imported_at_once() -> None:
    names: dict[str, object] = {}
    exec("from peftcli.peft_api.utils import *", names)
    assert {"PeftType", "infer_device", "get_peft_model_state_dict"} <= names.keys()
    assert names.keys().isdisjoint({"nn", "torch", "os"})


def test_a_module_asked_for_its_file_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``inspect.getmodule`` asks all modules, in the middle of an import of torch's too."""
    modules = [importlib.import_module(f"peftcli.peft_api.{path}") for path in NAMESPACES]
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"imports {name}"))
    assert not any(hasattr(module, "__file__") for module in modules)


def test_the_classes_tell_methods_and_layers_apart() -> None:
    base = tiny("llama")
    kind = peftcli.PEFT_TYPE_TO_TUNER_MAPPING["LORA"]
    assert kind is peftcli.LoraModel
    tuner = kind(base, peftcli.LoraConfig(target_modules=["q_proj"]), "default", low_cpu_mem_usage=True)
    assert isinstance(tuner, peftcli.LoraModel)
    assert not isinstance(tuner, peftcli.IA3Model)
    assert isinstance(peftcli.get_peft_model(tiny("llama"), peftcli.IA3Config()).base_model, peftcli.IA3Model)
    found = {(value.requires_grad, value.is_meta) for name, value in tuner.named_parameters() if "lora" in name}
    assert found == {(True, True)}
    adapted = base.model.layers[0].self_attn.q_proj
    assert isinstance(adapted, peftcli.peft_api.tuners.lora.Linear)
    assert not isinstance(adapted, peftcli.peft_api.tuners.lora.Embedding)
    with pytest.raises(peftcli.errors.AdapterError, match="IA3Model takes a config of IA3, not LORA"):
        peftcli.IA3Model(base, peftcli.LoraConfig())
    assert {name for name in peft.__all__ if name.endswith("Model")} - {*peftcli.PEFT_NAMES} == {"ShadowModel"}


def test_the_tables_say_what_pefts_say() -> None:
    theirs = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    ours = mapping.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert ours.items() <= theirs.items()
    theirs = peft.utils.constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    ours = mapping.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    assert {name for name in ours if sorted(ours[name]) != sorted(theirs[name])} == {"mixtral"}
    for name in ("CONFIG_NAME", "SAFETENSORS_WEIGHTS_NAME", "WEIGHTS_NAME", "INCLUDE_LINEAR_LAYERS_SHORTHAND"):
        assert getattr(mapping, name) == getattr(peft.utils, name)
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is peftcli.LoraConfig
    assert mapping.MODEL_TYPE_TO_PEFT_MODEL_MAPPING["CAUSAL_LM"] is peftcli.PeftModelForCausalLM


def test_the_small_functions_give_what_pefts_give() -> None:
    labels = torch.tensor([[5, 6, -100, -100], [7, -100, 8, 9]])
    assert training.shift_tokens_right(labels, 1, 2).equal(peft.utils.shift_tokens_right(labels, 1, 2))
    with pytest.raises(peftcli.errors.AdapterError, match="pad_token_id: has to be defined"):
        training.shift_tokens_right(labels, None, 2)
    assert training.infer_device() == peft.utils.infer_device()
    model = peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig(r=2))
    training.cast_mixed_precision_params(model, torch.bfloat16)
    kinds = {(value.requires_grad, value.dtype) for value in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_fsdp_wraps_the_blocks_and_the_trained_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig(r=2))
    policy, theirs = for_libraries.fsdp_auto_wrap_policy(model), peft.utils.other.fsdp_auto_wrap_policy(model)
    wrapped = {name for name, module in model.named_modules() if policy(module, recurse=False, nonwrapped_numel=0)}
    assert wrapped == {
        name for name, module in model.named_modules() if theirs(module, recurse=False, nonwrapped_numel=0)
    }
    assert {name.rpartition(".")[2] for name in wrapped} == {"0", "1", "lora_A", "lora_B"}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "NoSuchBlock")
    with pytest.raises(peftcli.errors.AdapterError, match="has no NoSuchBlock"):
        for_libraries.fsdp_auto_wrap_policy(model)
