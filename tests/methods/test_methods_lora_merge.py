"""Merged to a checkpoint, shard by shard or whole, LoRA's further kinds compute what base model and adapter compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import VOCABULARY, ids, logits, randomise, tiny
from trainkit import tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from peftcli.adapters.merge import merge_adapter
from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import inject, set_trainable
from peftcli.methods import config_from_dict
from peftcli.methods.lora import LoraConfig

INPUTS = {"input_ids": ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "dora": ("llama", {"use_dora": True}, False),
    "dora-gpt2": ("gpt2", {"use_dora": True, "bias": "lora_only", "target_modules": ["c_attn"]}, False),
    "dora-embedding": ("llama_tied", {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}, True),
    "dora-pissa": ("llama", {"use_dora": True, "init_lora_weights": "pissa"}, False),
    "lora-bias": ("gpt2", {"lora_bias": True, "target_modules": ["c_attn"]}, False),
    "tokens": ("llama_tied", {"trainable_token_indices": [3, 7]}, False),
    "tokens-apart": ("llama_tied", {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [7]}}, True),
    "tied": ("llama_tied", {"ensure_weight_tying": True, "target_modules": ["lm_head", "q_proj"]}, False),
    "tied-saved": ("llama_tied", {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}, False),
    "replicated": ("llama", {"layer_replication": [[0, 2], [1, 2]]}, False),
    "replicated-turned": ("llama", {"layer_replication": [[1, 2], [0, 1]]}, False),
    "replicated-some": ("llama_tied", {"layer_replication": [[0, 2], [0, 2]], "layers_to_transform": [1]}, False),
    "kasa": ("llama", {"kasa_config": {}, "r": 4}, False),
    "experts": ("mixtral", {"target_parameters": ["gate_up_proj", "down_proj"]}, False),
}  # with whether the ends of the model are untied


@pytest.mark.grid
@pytest.mark.parametrize("name", CASES)
def test_the_merged_model_computes_what_base_and_adapter_compute(name: str, tmp_path: Path) -> None:
    kind, settings, unties = CASES[name]
    base, folder, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    tiny(kind).save_pretrained(base)
    tokenizer().save_pretrained(base)
    targets = {"target_modules": ["q_proj", "v_proj"]} if "target_parameters" not in settings else {}
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(base_model_name_or_path=str(base), task_type="CAUSAL_LM", **{**targets, **settings})
    inject(model, config)
    set_trainable(model, True)
    randomise(model)
    save_adapter(model, config, folder)
    again = AutoModelForCausalLM.from_pretrained(base)
    load_adapter(again, config_from_dict(read_config(folder)), folder)
    expected = logits(again.eval(), INPUTS)
    assert expected.shape[-1] == VOCABULARY
    made = merge_adapter(str(folder), merged)
    found = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(logits(found.eval(), INPUTS), expected, atol=1e-4, rtol=1e-4)
    assert made["untied"] == unties
    tied = AutoConfig.from_pretrained(base).tie_word_embeddings and not unties
    assert AutoConfig.from_pretrained(merged).tie_word_embeddings == tied
    assert found.config.num_hidden_layers == model.config.num_hidden_layers
