"""Configs have the keys, the defaults, the types and the methods of PEFT's."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import batch, logits, tiny
from oracle import PEFTS_METHODS
from peft.utils import constants
from transformers import CONFIG_MAPPING

import peftcli
from peftcli.core.config import plain
from peftcli.core.weights import load_training_state, training_state
from peftcli.errors import AdapterError, AdapterTypeError
from peftcli.guard.typed_fields import fits, hints_of
from peftcli.methods import METHODS
from peftcli.peft_api import PeftConfig, PeftType, TaskType
from peftcli.peft_api.config import PromptLearningConfig

_NEEDED: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": 1},
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 2},
    "cpt": {"task_type": "CAUSAL_LM"},
    "xlora": {"hidden_size": 32, "adapters": {"0": "folder"}},  # without, PEFT warns
    **{
        method: {"num_virtual_tokens": 4}
        for method in ("prompt_tuning", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "cartridge")
    },
}
_NOTHING = (None, {}, [])
_ABSENT_MODULES = {("ia3", "mixtral"), ("osf", "mixtral"), ("osf", "phi"), ("adamss", "vit")}
"""Where PEFT's default targets name modules that the family does not have in today's transformers."""


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: None if value in _NOTHING else value for key, value in values.items() if key != "peft_version"}


@pytest.mark.parametrize("method", PEFTS_METHODS)
def test_each_reads_what_the_other_writes(method: str, tmp_path: Path) -> None:
    cls, given = METHODS[method].config_class(), _NEEDED.get(method, {})
    theirs = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[cls.peft_type]](**given)
    for key in {"target_modules", "exclude_modules"} & set(vars(theirs)):
        setattr(theirs, key, "a" if method == "adaption_prompt" else ["b", "a"])  # it takes one name
    theirs = type(theirs)(**theirs.to_dict())
    ours = cls(**theirs.to_dict())
    assert all(
        type(getattr(ours, key)) is type(value) for key, value in vars(theirs).items() if key == "target_modules"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    read = PeftConfig.from_pretrained(tmp_path / "theirs")
    assert read == ours
    assert read.peft_version == peft.__version__
    ours.save_pretrained(tmp_path / "ours")
    assert cls.from_pretrained(tmp_path, subfolder="ours") == ours
    assert _plain(peft.PeftConfig.from_pretrained(tmp_path / "ours").to_dict()) == _plain(theirs.to_dict())
    assert cls(peft_type="another") == cls.from_peft_type() == copy.deepcopy(pickle.loads(pickle.dumps(cls())))


@pytest.mark.parametrize("method", PEFTS_METHODS)
def test_a_file_has_null_where_peft_writes_it_and_nowhere_else(method: str) -> None:
    cls = METHODS[method].config_class()
    given = {key: value for key, value in _NEEDED.get(method, {}).items() if key != "num_virtual_tokens"}
    theirs = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[cls.peft_type]](**given).to_dict()
    written = {key: plain(value) for key, value in theirs.items()}
    cls.from_dict(written)
    hints = hints_of(cls)
    for key in [key for key in hints if written.get(key) not in _NOTHING and not fits(None, hints[key])]:
        if written[key] is False:  # axolotl writes fan_in_fan_out: null
            cls.from_dict({**written, key: None})
            continue
        with pytest.raises(AdapterTypeError, match=r"(found|not) null") as caught:
            cls.from_dict({**written, key: None})
        assert caught.value.key == key


@pytest.mark.parametrize("name", ["~nobody-of-this-name/adapter", "a" * 5000, "a\0b"])
def test_a_name_that_no_file_can_have_is_told(name: str) -> None:
    with pytest.raises(AdapterError, match="is neither a folder nor a hub id") as caught:
        peftcli.PeftConfig.from_pretrained(name)
    assert len(str(caught.value)) < 200


def test_what_a_config_says_of_itself() -> None:
    config = peftcli.LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=("b", "a"), init_lora_weights="OLoRA")
    assert config.init_lora_weights == "olora"
    assert (config.peft_type, config.peft_type.value, f"{config.peft_type}") == (PeftType.LORA, "LORA", "LORA")
    assert (config.task_type, config.task_type.value) == ("CAUSAL_LM", "CAUSAL_LM")
    assert issubclass(peftcli.LoraConfig, PeftConfig)
    assert not config.is_prompt_learning
    assert not config.is_adaption_prompt
    assert peftcli.AdaptionPromptConfig(adapter_len=4, adapter_layers=1).is_adaption_prompt
    assert peftcli.PrefixTuningConfig().is_prompt_learning
    assert issubclass(peftcli.PrefixTuningConfig, PromptLearningConfig)


def test_settings_stay_what_they_are(tmp_path: Path) -> None:
    """The file of a trained adapter says another r, that of the config alone does not."""
    config = peftcli.LoraConfig(init_lora_weights="pissa", runtime_config=peftcli.LoraRuntimeConfig(True))
    config.save_pretrained(tmp_path, auto_mapping_dict={"base_model_class": "LlamaModel"})
    values = peftcli.LoraConfig.from_json_file(tmp_path / "adapter_config.json")
    assert (values["r"], values["init_lora_weights"], "runtime_config" in values) == (8, "pissa", False)
    assert values["auto_mapping"] == {"base_model_class": "LlamaModel"}
    assert peftcli.PeftConfig.from_pretrained(tmp_path) == peftcli.LoraConfig(init_lora_weights="pissa")


def test_unknown_keys_are_told_in_a_file_and_an_error_in_code(tmp_path: Path) -> None:
    told = "Unexpected keyword arguments ..spam.. for class LoraConfig, these are ignored"
    with pytest.warns(UserWarning, match=told):
        assert peftcli.LoraConfig.from_peft_type(spam=1, r=4).r == 4
    with pytest.raises(TypeError, match="spam"):
        peftcli.LoraConfig(spam=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        peftcli.PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"task_type": "CAUSAL"},
        {"target_modules": "q_.*", "layers_to_transform": [0]},
        {"layers_pattern": "layers"},
        {"megatron_config": {"tp": 2}},
    ],
)
def test_wrong_settings_are_an_error_when_the_config_is_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=next(reversed(wrong))):
        peftcli.LoraConfig(**wrong)


def test_errors_are_of_the_classes_that_pefts_are(tmp_path: Path) -> None:
    with pytest.raises(peftcli.NoMatchingPeftModuleError, match="q_porj") as error:
        peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig(target_modules=["q_porj"]))
    assert isinstance(error.value, (peftcli.PeftError, ValueError))
    for wrong in ({"target_parameters": "up_proj"}, {"peft_type": None}):
        with pytest.raises(TypeError, match=r"peft_type|target_parameters"):
            peftcli.LoraConfig.from_peft_type(**wrong)
    tmp_path.joinpath("adapter_config.json").write_text('{"r": 4}')
    with pytest.raises(TypeError, match=r"json: The LoraConfig config .* is missing required keys: \{'peft_type'\}"):
        peftcli.LoraConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Invalid task type: 'CAUSAL'\. Must be one of"):
        peftcli.LoraConfig(task_type="CAUSAL")
    with pytest.raises(TypeError, match="list of names"):
        peftcli.LoraConfig(target_parameters="up_proj")  # type: ignore[arg-type]


def test_what_changes_nothing_or_more_than_it_says_is_told() -> None:
    with pytest.warns(peftcli.PeftWarning, match="does not use r"):
        peftcli.AdaLoraConfig(r=4)
    config = peftcli.LoraConfig(base_model_name_or_path="another", exclude_modules=["lm_head"])
    model: Any = tiny("llama")
    model.name_or_path = "a name"
    with (
        pytest.warns(peftcli.PeftWarning, match="renamed from 'another' to 'a name'"),
        pytest.warns(UserWarning, match="excludes none"),
    ):
        model = peftcli.get_peft_model(model, config)
    assert config.base_model_name_or_path == "a name"
    with pytest.warns(peftcli.PeftWarning, match="has an adapter already"):
        peftcli.get_peft_model(model.get_base_model(), peftcli.LoraConfig(), "second")


def test_an_adapter_on_a_model_with_another_one_computes_alone(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"target_modules": ["v_proj"], "init_lora_weights": False}
    alone = peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig(**settings), "second").eval()
    alone.save_pretrained(tmp_path)
    wanted = logits(alone, batch("llama"))
    for kind in ("get_peft_model", "PeftModel", "LoraModel"):
        base, config = tiny("llama"), peftcli.LoraConfig(**settings)
        peftcli.get_peft_model(base, peftcli.LoraConfig(init_lora_weights=False))
        if kind == "PeftModel":
            second = peftcli.PeftModel.from_pretrained(base, tmp_path / "second", "second")
        elif kind == "LoraModel":
            second = peftcli.LoraModel(base, config, "second")
        else:
            with pytest.warns(peftcli.PeftWarning, match="has an adapter already"):
                second = peftcli.get_peft_model(base, config, "second")
        load_training_state(base, training_state(alone.get_base_model()), "second")
        torch.testing.assert_close(logits(second.eval(), batch("llama")), wanted)


def test_options_of_the_tokenizer_of_a_prompts_text() -> None:
    settings: dict[str, Any] = {"prompt_tuning_init_text": "a text", "tokenizer_kwargs": {"use_fast": False}}
    asked = []

    def load(name: str | None, **options: Any) -> Any:
        asked.append((name, options))
        return lambda text: {"input_ids": [len(text)]}

    config = peftcli.PromptTuningConfig(prompt_tuning_init="TEXT", tokenizer_name_or_path="its", **settings)
    config.prepare(load)
    assert (config.init_token_ids, asked) == ([6], [("its", {"use_fast": False})])
    with pytest.raises(ValueError, match="tokenizer_kwargs"):
        peftcli.PromptTuningConfig(**settings)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "ln_tuning"])
def test_unset_target_modules_are_pefts_for_every_family_that_it_knows(method: str) -> None:
    cls = METHODS[method].config_class()
    table = f"TRANSFORMERS_MODELS_TO_{cls.__name__.removesuffix('Config').upper()}_TARGET_MODULES_MAPPING"
    for family, expected in getattr(constants, table, {}).items():
        if family in CONFIG_MAPPING and (method, family) not in _ABSENT_MODULES:
            found = cls().usual_targets(family)
            assert (found if isinstance(found, str) else set(found)) == (
                expected if isinstance(expected, str) else set(expected)
            ), family
