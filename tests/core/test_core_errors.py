"""A wrong setting or file is named, with what to do; the model stays as it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import peft
import pytest
import torch
from models_tiny import tiny
from safetensors.torch import load_file, save_file
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import inject
from peftcli.core.weights import adapter_state, load_state
from peftcli.errors import AdapterError
from peftcli.methods import METHODS, config_from_dict
from peftcli.methods.adamss import AdamssConfig
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.initialisations import EvaConfig
from peftcli.methods.poly import PolyConfig
from peftcli.methods.prefix_tuning import PrefixTuningConfig
from peftcli.methods.prompt_tuning import PromptTuningConfig


def _fingerprint(model: nn.Module) -> list[Any]:
    """Everything of a model that injection could change."""
    return [
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(name, id(value), value.requires_grad, value._version) for name, value in model.named_parameters()],
        [len(module._forward_pre_hooks) for module in model.modules()],
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 8.5),
        ("r", [8]),
        ("r", 2**64),
        ("lora_alpha", [8]),
        ("lora_alpha", math.inf),
        ("lora_dropout", {}),
        ("alpha_pattern", {"q_proj": math.nan}),
        ("r", True),
        ("target_modules", [["q"]]),
        ("target_modules", [1]),
        ("target_modules", {1, "q_proj"}),
        ("modules_to_save", [1]),
        ("layers_to_transform", ["0"]),
        ("layers_pattern", 3),
        ("rank_pattern", {"q": "3"}),
        ("base_model_name_or_path", 5),
    ],
)
def test_a_value_of_another_type_is_told_by_its_key(key: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{key}: expected .*, found") as caught:
        LoraConfig(**{key: value})
    assert isinstance(caught.value, AdapterError)


def test_a_value_of_another_type_in_a_section_is_told_by_its_key() -> None:
    with pytest.raises(AdapterError, match=r"eva_config\.rho: expected float, found '2'"):
        EvaConfig(rho="2")  # type: ignore[arg-type]


def test_values_that_json_has_in_another_form_are_taken() -> None:
    given: Any = {"base_model_name_or_path": Path("base"), "trainable_token_indices": {"wte": (1, 2)}, "use_dora": 1}
    config = LoraConfig(**given, init_lora_weights=1)
    assert config.use_dora is True
    assert config.init_lora_weights is True
    assert config.base_model_name_or_path == "base"
    assert config.trainable_token_indices == {"wte": [1, 2]}


def test_values_of_numpy_and_pytorch_and_other_collections_are_taken() -> None:
    given: Any = {"r": np.int64(4), "lora_alpha": torch.tensor(8), "target_modules": {"q_proj": 1}.keys()}
    given |= {"rank_pattern": MappingProxyType({"q": np.int64(2)}), "trainable_token_indices": {"wte": range(2)}}
    assert (
        LoraConfig(**given).to_dict()
        == LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj"],
            rank_pattern={"q": 2},
            trainable_token_indices={"wte": [0, 1]},
        ).to_dict()
    )


@pytest.mark.parametrize(
    ("method", "settings", "key"),
    [
        ("randlora", {"randlora_alpha": 0}, "randlora_alpha"),
        ("delora", {"delora_lambda": 0}, "delora_lambda"),
        ("delora", {"lambda_pattern": {"q_proj": 0.0}}, "lambda_pattern"),
        ("vera", {"d_initial": 0}, "d_initial"),
        ("cartridge", {"num_virtual_tokens": 4, "num_frozen_tokens": 4}, "num_frozen_tokens"),
        ("cpt", {"cpt_token_ids": [5, 6], "cpt_tokens_type_mask": [0, 4]}, "cpt_tokens_type_mask"),
        ("cpt", {"opt_projection_epsilon": 0, "opt_projection_format_epsilon": 0}, "opt_projection_format_epsilon"),
        ("cpt", {"cpt_token_ids": [1, 2], "opt_projection_format_epsilon": 0}, "opt_projection_format_epsilon"),
        (
            "cpt",
            {"context": [{"prompt": "a", "completion": "b"}], "opt_projection_epsilon": 0},
            "opt_projection_epsilon",
        ),
    ],
)
def test_settings_with_which_nothing_would_train_are_refused(method: str, settings: dict[str, Any], key: str) -> None:
    with pytest.raises(AdapterError) as caught:
        METHODS[method].config_class()(**settings)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("randlora", {"randlora_alpha": 0}),
        ("delora", {"delora_lambda": 0}),
        ("delora", {"lambda_pattern": {"q_proj": 0.0}}),
        ("lora", {"alora_invocation_tokens": []}),
        ("lora", {"trainable_token_indices": {}, "layer_replication": []}),
    ],
)
def test_a_file_may_hold_settings_with_which_nothing_would_train(method: str, settings: dict[str, Any]) -> None:
    METHODS[method].config_class()(**settings, inference_mode=True)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("randlora", {"randlora_alpha": -8}),
        ("delora", {"delora_lambda": -1}),
        ("delora", {"delora_lambda": 0, "init_weights": False}),
    ],
)
def test_settings_with_which_something_trains_are_taken(method: str, settings: dict[str, Any]) -> None:
    METHODS[method].config_class()(**settings)


WRONG: dict[str, tuple[AdapterConfig, str]] = {
    "target": (
        LoraConfig.unchecked(target_modules=["q_porj"]),
        r"target_modules: no module of LlamaForCausalLM matches 'q_porj'; closest: q_proj",
    ),
    "one of two targets": (LoraConfig.unchecked(target_modules=["v_proj", "q_porj"]), "'q_porj'; closest: q_proj"),
    "dotted target": (LoraConfig.unchecked(target_modules=["self_attn.q_porj"]), "closest: self_attn.q_proj"),
    "part of a name": (LoraConfig.unchecked(target_modules=["proj"]), "target_modules: .*'proj'; closest: .*_proj"),
    "regex": (
        LoraConfig.unchecked(target_modules=r".*\.q_porj"),
        "target_modules: no module of LlamaForCausalLM matches",
    ),
    "a name as a regex": (
        LoraConfig.unchecked(exclude_modules="self_attn.q_proj"),
        r"matches 'self_attn.q_proj'\na string is a regular expression .* write a list: \[self_attn.q_proj\]",
    ),
    "no regex": (LoraConfig.unchecked(target_modules=r"*q_proj"), "target_modules: .* is not a regular expression"),
    "long regex": (LoraConfig.unchecked(target_modules="a" * 5000), "target_modules: a pattern of 5000 characters"),
    "no linear": (
        LoraConfig.unchecked(target_modules=["input_layernorm"]),
        "input_layernorm is a LlamaRMSNorm; LoRA adapts Linear",
    ),
    "a whole block": (LoraConfig.unchecked(target_modules=["mlp"]), "mlp is a LlamaMLP; LoRA adapts"),
    "empty": (LoraConfig.unchecked(target_modules=[]), "target_modules: names no module"),
    "saved": (LoraConfig.unchecked(modules_to_save=["lm_haed"]), "modules_to_save: .*'lm_haed'; closest: lm_head"),
    "saved by part of a name": (LoraConfig.unchecked(modules_to_save=["head"]), "modules_to_save: .*'head'"),
    "saved and adapted": (
        LoraConfig.unchecked(target_modules=["lm_head"], modules_to_save=["lm_head"]),
        "modules_to_save leaves no",
    ),
    "excluded": (LoraConfig.unchecked(exclude_modules=["v_porj"]), "exclude_modules: .*'v_porj'; closest: v_proj"),
    "all excluded": (
        LoraConfig.unchecked(exclude_modules=["q_proj", "v_proj"]),
        "target_modules: no module .* is left to adapt",
    ),
    "rank pattern": (
        LoraConfig.unchecked(rank_pattern={"q_porj": 4}),
        "rank_pattern: no adapted module matches 'q_porj'; closest: q_proj",
    ),
    "rank pattern of another module": (
        LoraConfig.unchecked(rank_pattern={"o_proj": 4}),
        "rank_pattern: no adapted module matches",
    ),
    "alpha pattern": (
        LoraConfig.unchecked(alpha_pattern={"q_porj": 4.0}),
        "alpha_pattern: no adapted module matches 'q_porj'",
    ),
    "layer": (
        LoraConfig.unchecked(target_modules=["q_proj"], layers_to_transform=[0, 7]),
        "layers_to_transform: no target module in layer 7; there are layers 0 to 1",
    ),
    "negative layer": (
        LoraConfig.unchecked(target_modules=["q_proj"], layers_to_transform=-1),
        "layers_to_transform: indices count from 0",
    ),
    "layers of a regex": (
        LoraConfig.unchecked(target_modules=r".*q_proj", layers_to_transform=1),
        "layers_to_transform: needs target_modules as a list",
    ),
    "layers pattern": (
        LoraConfig.unchecked(target_modules=["q_proj"], layers_to_transform=1, layers_pattern="blocks"),
        "layers_to_transform: ",
    ),
    "layers pattern alone": (LoraConfig.unchecked(layers_pattern="layers"), "layers_pattern: means nothing without"),
    "r": (LoraConfig.unchecked(r=0), "r: must be at least 1, not 0"),
    "r far too large": (LoraConfig.unchecked(r=4096), "r: 4096 is far larger"),
    "alpha": (LoraConfig.unchecked(lora_alpha=-1), "lora_alpha: must be above 0, not -1"),
    "dropout": (LoraConfig.unchecked(lora_dropout=1.0), r"lora_dropout: must be in \[0, 1\)"),
    "r of a pattern": (LoraConfig.unchecked(rank_pattern={"q_proj": 0}), "rank_pattern: q_proj: must be at least 1"),
    "alpha of a pattern": (
        LoraConfig.unchecked(alpha_pattern={"q_proj": 0}),
        "alpha_pattern: q_proj: must be above 0",
    ),
    "bias": (LoraConfig.unchecked(bias="some"), "bias: must be none, all or lora_only, not 'some'"),  # type: ignore[arg-type]
    "one choice": (PolyConfig.unchecked(poly_type="x"), "poly_type: must be poly, not 'x'"),  # type: ignore[arg-type]
    "a choice or unset": (
        PrefixTuningConfig.unchecked(init_weights="x"),  # type: ignore[arg-type]
        "init_weights: must be zero or unset, not 'x'",
    ),
    "a choice or false": (
        AdamssConfig.unchecked(init_weights=True),  # type: ignore[arg-type]
        "init_weights: must be orthogonal, false or unset, not True",
    ),
    "init": (LoraConfig.unchecked(init_lora_weights="pisa"), "init_lora_weights: 'pisa' is not supported"),  # type: ignore[arg-type]
    "virtual tokens": (PromptTuningConfig.unchecked(num_virtual_tokens=0), "num_virtual_tokens: must be at least 1"),
    "prompt init": (PromptTuningConfig.unchecked(prompt_tuning_init="WORDS"), "prompt_tuning_init: must be"),  # type: ignore[arg-type]
    "prompt without text": (
        PromptTuningConfig.unchecked(prompt_tuning_init="TEXT"),
        "prompt_tuning_init_text: .* needs it",
    ),
    "prompt width": (PromptTuningConfig.unchecked(token_dim=99), "token_dim: the adapter's is 99, the base model's 32"),
    "prompt text not prepared": (
        PromptTuningConfig.unchecked(prompt_tuning_init="TEXT", prompt_tuning_init_text="x"),
        "call prepare",
    ),
    "prompt saved": (
        PromptTuningConfig.unchecked(modules_to_save=["lm_haed"]),
        "modules_to_save: .*'lm_haed'; closest: lm_head",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_named_and_nothing_is_changed(name: str) -> None:
    config, message = WRONG[name]
    model = tiny("llama").train()
    before = _fingerprint(model)
    with pytest.raises(AdapterError, match=message) as caught:
        inject(model, config)
    assert isinstance(caught.value, ValueError), "what PEFT raises"
    assert _fingerprint(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    inject(model, LoraConfig())  # and a right one still goes in


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", 1),
        ("init_lora_weights", "pisa"),
        ("layer_replication", [0, 2]),
        ("layer_replication", [[0, 2], [2, 1]]),
        ("trainable_token_indices", {"embed_tokens": 3}),
        ("trainable_token_indices", [-1]),
        ("target_parameters", "experts"),
        ("alora_invocation_tokens", [-5]),
        ("megatron_config", {"a": 1}),
        ("megatron_core", "mine"),
        ("velora_config", {"rank": 4}),
        ("monteclora_config", {"num_samples": 4000000}),
        ("use_bdlora", {"nblocks": 0}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": -1e-4}),
        ("runtime_config", {"ephemeral_gpu_offload": True}),
        ("some_new_key", "on"),
        ("r", "8"),
        ("r", 2.5),
        ("r", True),
        ("lora_alpha", [8]),
        ("lora_alpha", float("nan")),
        ("target_modules", 3),
        ("rank_pattern", [4]),
        ("rank_pattern", {"q_proj": "4"}),
        ("alpha_pattern", {"q_proj": "x"}),
        ("target_modules", [1, 2]),
        ("modules_to_save", "classifier"),
        ("layers_to_transform", ["a"]),
        ("bias", "some"),
        ("lora_dropout", "0.1"),
    ],
)
def test_a_setting_of_a_file_that_is_not_supported_or_wrong_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(AdapterError) as caught:
        config_from_dict(
            {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], key: value}, "x/adapter_config.json"
        )
    assert (caught.value.key or "").partition(".")[0] == key
    assert "x/adapter_config.json" in str(caught.value)


@pytest.mark.parametrize("value", ["ADALORAS", None, "lora", 3, ["LORA"]])
def test_an_unknown_method_is_named_with_the_known_ones(value: Any) -> None:
    with pytest.raises(AdapterError, match=r"known: LORA, .*PROMPT_TUNING"):
        config_from_dict({"peft_type": value})


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "modules_to_save"])
def test_null_in_a_file_means_empty(key: str) -> None:
    config = config_from_dict({"peft_type": "LORA", "target_modules": ["q_proj"], key: None})
    assert getattr(config, key) == getattr(LoraConfig(), key)
    inject(tiny("llama"), config)


def test_every_key_that_peft_writes_is_read() -> None:
    values = peft.LoraConfig(target_modules=["q_proj"]).to_dict()
    values = json.loads(json.dumps(values, default=sorted))
    assert config_from_dict(values) == LoraConfig(target_modules=["q_proj"])
    values = peft.PromptTuningConfig(num_virtual_tokens=3).to_dict()
    assert config_from_dict(json.loads(json.dumps(values))) == PromptTuningConfig(num_virtual_tokens=3)


# the adapter's tensors


def _state() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = tiny("llama")
    inject(model, LoraConfig(r=4))
    return model, {name: value.clone() + 1 for name, value in adapter_state(model).items()}


def test_a_long_list_of_wrong_tensors_is_cut() -> None:
    model, above = _state()
    inject(other := tiny("llama"), LoraConfig(target_modules="all-linear"))
    with pytest.raises(AdapterError, match=r"and \d+ more") as caught:
        load_state(model, adapter_state(other))
    assert len(str(caught.value).splitlines()) <= 6
    assert all(torch.equal(value + 1, above[name]) for name, value in adapter_state(model).items()), "nothing is loaded"


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_tensors_that_are_no_numbers_of_a_model_are_refused(dtype: torch.dtype) -> None:
    model, tensors = _state()
    name = next(iter(tensors))
    with pytest.raises(AdapterError, match=name.replace(".", r"\.")):
        load_state(model, {**tensors, name: torch.zeros(tensors[name].shape, dtype=dtype)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_tensors_of_another_precision_are_taken(dtype: torch.dtype) -> None:
    model, tensors = _state()
    load_state(model, {name: value.to(dtype) for name, value in tensors.items()})
    assert {value.dtype for value in adapter_state(model).values()} == {torch.float32}


# the adapter's files


def _folder(path: Path) -> Path:
    model, config = tiny("llama"), LoraConfig(r=4)
    inject(model, config)
    save_adapter(model, config, path)
    return path


def _load(folder: Path) -> None:
    load_adapter(tiny("llama"), config_from_dict(read_config(folder)), folder)


def _write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def _pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _link(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").mkdir()


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickle": (_pickled, r"adapter_model\.bin is a pickle"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"no adapter_model\.safetensors"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), r"no adapter_config\.json here"),
    "config is a folder": (_link, r"adapter_config\.json: is a folder, not a regular file"),
    "cut short": (_cut, "damaged"),
    "no tensors": (_write("adapter_model.safetensors", b"{}"), "damaged"),
    "empty weights": (_write("adapter_model.safetensors", b""), "damaged"),
    "no JSON": (_write("adapter_config.json", b"{"), "not valid JSON"),
    "deep JSON": (_write("adapter_config.json", b"[" * 100_000), "not valid JSON"),
    "not UTF-8": (_write("adapter_config.json", b'{"a": "\xff\xfe"}'), ":1: not UTF-8 text"),
    "a list": (_write("adapter_config.json", b"[]"), "holds no JSON object"),
    "huge": (_write("adapter_config.json", b" " * (1 << 21)), "2,097,152 bytes, and at most 1,048,576"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_clear_error(name: str, tmp_path: Path) -> None:
    spoil, message = BROKEN[name]
    spoil(_folder(tmp_path))
    with pytest.raises(AdapterError, match=message) as caught:
        _load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_non_finite_weights_are_not_written(tmp_path: Path) -> None:
    model, config = tiny("llama"), LoraConfig(r=4)
    inject(model, config)
    value = next(iter(adapter_state(model).values()))
    value[0, 0] = torch.nan
    with pytest.raises(AdapterError, match="not finite"):
        save_adapter(model, config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / "adapter_model.safetensors")
    model = tiny("llama")
    before = _fingerprint(model)
    config = LoraConfig(r=4)
    with pytest.raises(AdapterError, match="missing"):
        load_adapter(model, config, folder)
    assert config == LoraConfig(r=4)
    assert _fingerprint(model)[0] == before[0]
