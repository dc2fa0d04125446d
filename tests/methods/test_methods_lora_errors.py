"""A wrong setting of LoRA is named, with what to do; the model stays as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models_tiny import tiny
from torch import nn

from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.errors import AdapterError, PeftWarning
from peftcli.methods.lora import LoraConfig

WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "a parameter": (
        "mixtral",
        {"target_parameters": ["gate_up_porj"]},
        "target_parameters: no parameter of Mixtral.*closest: gate_up_proj",
    ),
    "one of two parameters": (
        "mixtral",
        {"target_parameters": ["down_proj", "experts.up_proj"]},
        "target_parameters: .*'experts.up_proj'; closest: ",
    ),
    "a module among parameters": (
        "mixtral",
        {"target_parameters": ["mlp.experts"]},
        "target_parameters: no parameter .* matches 'mlp.experts'",
    ),
    "a parameter and its module": (
        "llama",
        {"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]},
        "target_parameters: .*q_proj is among target_modules too",
    ),
    "a vector": (
        "llama",
        {"target_parameters": ["model.norm.weight"]},
        r"target_parameters: model.norm.weight has the shape \(32,\); LoRA adapts matrices",
    ),
    "r of a parameter": ("mixtral", {"target_parameters": ["down_proj"], "r": 1024}, "r: 1024 is far larger than"),
    "dropout on a parameter": (
        "mixtral",
        {"target_parameters": ["down_proj"], "lora_dropout": 0.1},
        "lora_dropout: does not go with target_parameters",
    ),
    "dora on a parameter": (
        "mixtral",
        {"target_parameters": ["down_proj"], "use_dora": True},
        "use_dora: does not go with target_parameters",
    ),
    "no target": ("llama", {"target_modules": []}, "target_modules: names no module"),
    "r of a pattern": ("llama", {"rank_pattern": {"v_proj": 999}}, "r: 999 is far larger than .*v_proj: 16 x 32"),
    "a pattern of a parameter": (
        "mixtral",
        {"target_parameters": ["down_proj"], "rank_pattern": {"gate_up_proj": 2}},
        "rank_pattern: no adapted module matches 'gate_up_proj'; there are: down_proj",
    ),
    "a token": (
        "llama",
        {"trainable_token_indices": [3, 96]},
        "trainable_token_indices: model.embed_tokens has the tokens 0 to 95, not 96",
    ),
    "a negative token": (
        "llama",
        {"trainable_token_indices": {"lm_head": [-1]}},
        "trainable_token_indices: token ids count from 0, not -1",
    ),
    "a token twice": ("llama", {"trainable_token_indices": [0, 1, 0]}, "trainable_token_indices: names token 0 twice"),
    "a token that is a text": ("llama", {"trainable_token_indices": ["a"]}, r"trainable_token_indices: .*\['a'\]"),
    "a range with a text": ("llama", {"layer_replication": [[0, "2"]]}, r"layer_replication: .*\[\[0, '2'\]\]"),
    "NaN": ("llama", {"lora_alpha": math.nan}, "lora_alpha: expected .*, found nan"),
    "NaN in a pattern": ("llama", {"alpha_pattern": {"q_proj": math.nan}}, "alpha_pattern: expected .*nan"),
    "no token": ("llama", {"trainable_token_indices": []}, "trainable_token_indices: names no token"),
    "no token of one": (
        "llama",
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": []}},
        "trainable_token_indices: names no token",
    ),
    "an embedding": (
        "llama",
        {"trainable_token_indices": {"embed_tokns": [1]}},
        "trainable_token_indices: no module .*closest: embed_tokens",
    ),
    "no embedding": (
        "llama",
        {"trainable_token_indices": {"norm": [1]}},
        "trainable_token_indices: model.norm is a LlamaRMSNorm; rows of Embedding",
    ),
    "a model that hears": (
        "convnet",
        {"trainable_token_indices": [1], "target_modules": ["convolution"]},
        "trainable_token_indices: .* has no input embedding; name the module",
    ),
    "tokens of a target": (
        "llama",
        {"trainable_token_indices": [1], "target_modules": ["embed_tokens"]},
        "trainable_token_indices: model.embed_tokens is among target_modules too",
    ),
    "tokens of a saved module": (
        "llama",
        {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
        "trainable_token_indices: model.embed_tokens is among modules_to_save too",
    ),
    "other tokens of a tied head": (
        "llama_tied",
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}, "ensure_weight_tying": True},
        "trainable_token_indices: tied layers need the same tokens",
    ),
    "a section that is none": ("llama", {"kasa_config": 3}, "kasa_config: expected a mapping or KasaConfig, found 3"),
    "a pattern of layers": (
        "llama",
        {"layers_to_transform": [0], "layers_pattern": "(layers"},
        r"layers_pattern: '\(layers' is not a regular expression",
    ),
    "dora and ties": (
        "llama_tied",
        {"ensure_weight_tying": True, "use_dora": True},
        "use_dora: does not go with ensure_weight_tying",
    ),
    "dora and a bias": ("llama", {"lora_bias": True, "use_dora": True}, "lora_bias: does not go with use_dora"),
    "a bias and another start": (
        "llama",
        {"lora_bias": True, "init_lora_weights": "gaussian"},
        "lora_bias: needs init_lora_weights",
    ),
    "a bias of an embedding": (
        "llama",
        {"lora_bias": True, "target_modules": ["embed_tokens"]},
        "lora_bias: is not supported for model.embed_tokens, an Embedding",
    ),
    "a range": (
        "llama",
        {"layer_replication": [[1, 1]]},
        r"layer_replication: each range is \[first layer, last layer \+ 1\], not \[1, 1\]",
    ),
    "three numbers": ("llama", {"layer_replication": [[0, 1, 2]]}, "layer_replication: each range is"),
    "no range": ("llama", {"layer_replication": []}, "layer_replication: names no layer"),
    "a layer of the deeper model": (
        "llama",
        {"layer_replication": [[0, 2], [0, 1]], "target_modules": ["q_proj"], "layers_to_transform": 3},
        "layers_to_transform: no target module in layer 3; there are layers 0 to 2",
    ),
    "a target of the deeper model": (
        "llama",
        {"layer_replication": [[0, 2], [0, 1]], "target_modules": ["q_porj"]},
        "target_modules: .*closest: q_proj",
    ),
    "a norm": (
        "llama",
        {"target_modules": ["norm"]},
        "target_modules: model.norm is a LlamaRMSNorm; LoRA adapts Linear, Conv1D, Embedding, Conv1d",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_named_and_nothing_is_changed(name: str) -> None:
    kind, settings, message = WRONG[name]
    model = tiny(kind)
    before = [(path, id(module)) for path, module in model.named_modules()], model.config.to_dict()
    with pytest.raises(AdapterError, match=message):
        inject(model, LoraConfig(**settings))
    assert ([(path, id(module)) for path, module in model.named_modules()], model.config.to_dict()) == before
    inject(
        model, LoraConfig(target_modules=["convolution" if kind == "convnet" else "q_proj"])
    )  # and a right one still goes in


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
