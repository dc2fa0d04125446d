"""Counts and sizes that are published for well-known models; no weight is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BloomForCausalLM,
    LlamaForCausalLM,
    MT5ForConditionalGeneration,
    OPTForCausalLM,
    T5ForConditionalGeneration,
    ViTForImageClassification,
)

from peftcli.core.config import AdapterConfig
from peftcli.core.files import write_adapter
from peftcli.core.inject import inject
from peftcli.core.weights import adapter_state
from peftcli.methods.ia3 import IA3Config
from peftcli.methods.lora import LoraConfig
from peftcli.methods.prefix_tuning import PrefixTuningConfig
from peftcli.methods.prompt_tuning import PromptTuningConfig
from peftcli.peft_api import get_peft_model

_LARGE = {"d_model": 1024, "d_kv": 64, "num_layers": 24, "num_heads": 16}
_OPT = {"vocab_size": 50272, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "ffn_dim": 4096}
_LLAMA = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mt0-large": (
        MT5ForConditionalGeneration,
        {"vocab_size": 250112, "d_ff": 2816, "feed_forward_proj": "gated-gelu", **_LARGE},
    ),
    "opt-350m": (OPTForCausalLM, {**_OPT, "word_embed_proj_dim": 512, "do_layer_norm_before": False}),
    "bloomz-560m": (BloomForCausalLM, {"vocab_size": 250880, "hidden_size": 1024, "n_layer": 24, "n_head": 16}),
    "llama-3.2-1b": (
        LlamaForCausalLM,
        {**_LLAMA, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    ),
    "vit-base": (ViTForImageClassification, {"num_labels": 101}),
    "t5-large": (T5ForConditionalGeneration, {"d_ff": 4096, **_LARGE}),
}
_VIT = LoraConfig(r=16, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
FIGURES: dict[str, tuple[AdapterConfig, int, int]] = {
    "mt0-large": (LoraConfig(r=8, task_type="SEQ_2_SEQ_LM"), 2359296, 1231940608),
    "opt-350m": (LoraConfig(r=16, target_modules=["q_proj", "v_proj"]), 1572864, 332769280),
    "bloomz-560m": (PromptTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"), 8192, 559222784),
    "llama-3.2-1b": (LoraConfig(r=8, target_modules=["q_proj"]), 524288, 1236338688),
    "vit-base": (_VIT, 667493, 86543818),
    "t5-large, a prompt": (PromptTuningConfig(num_virtual_tokens=20, task_type="SEQ_2_SEQ_LM"), 20480, 737688576),
    "bloomz-560m, a prefix": (PrefixTuningConfig(num_virtual_tokens=30, task_type="CAUSAL_LM"), 1474560, 560689152),
    "mt0-large, IA3": (IA3Config(task_type="SEQ_2_SEQ_LM"), 282624, 1229863936),
}
"""Model and adapter -> config, and numbers of parameters that train, and of all."""


def _built(name: str) -> nn.Module:
    kind, sizes = MODELS[name.partition(",")[0]]
    with torch.device("meta"):
        model = kind(kind.config_class(**sizes))
        if kind is MT5ForConditionalGeneration:  # the published model's head is its own, which its config cannot say
            model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    return model


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("name", FIGURES)
def test_counts(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config, trainable, total = FIGURES[name]
    with torch.device("meta"):
        model = get_peft_model(_built(name), config)
    assert model.get_nb_trainable_parameters() == (trainable, total)
    model.print_trainable_parameters()
    share = f"trainable%: {100 * trainable / total:.4f}"
    assert capsys.readouterr().out == f"trainable params: {trainable:,d} || all params: {total:,d} || {share}\n"


def test_the_injections_own_counts_and_share() -> None:
    config, *expected = FIGURES["mt0-large"]
    with torch.device("meta"):
        injection = inject(_built("mt0-large"), config)
    assert [injection.trainable, injection.total] == expected
    assert 100 * injection.trainable / injection.total == 0.19151053100118282


def test_file_of_opt_350m(tmp_path: Path) -> None:
    config, *_ = FIGURES["opt-350m"]
    model = _built("opt-350m")
    with torch.device("meta"):
        inject(model, config)
    state = adapter_state(model)
    assert {value.dtype for value in state.values()} == {torch.float32}
    zeros = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in state.items()}
    write_adapter(zeros, config, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    assert len(load_file(file)) == 96
    assert file.stat().st_size == 6_304_960
