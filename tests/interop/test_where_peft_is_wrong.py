"""Errors of PEFT: its behaviour as it is, and ours.

When PEFT mends one, the half of the test that shows its behaviour fails: then change the docs that mention it.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trainkit
from models_tiny import ids, logits, tiny
from oracle import ours, theirs
from torch import nn

from peftcli.adapters.merge import merge_adapter
from peftcli.core.files import save_adapter
from peftcli.core.inject import inject
from peftcli.core.prompts.generate import generate
from peftcli.errors import AdapterError
from peftcli.methods.lora import LoraConfig


def _greedy(model: nn.Module, tokens: torch.Tensor, steps: int) -> torch.Tensor:
    """What a loop over forward without any cache chooses."""
    for _ in range(steps):
        tokens = torch.cat([tokens, logits(model, {"input_ids": tokens})[:, -1:].argmax(-1)], 1)
    return tokens


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_interop_3_1_soft_prompts_and_generate(kind: str) -> None:
    settings: dict[str, Any] = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
    own, _ = ours(kind, "prompt_tuning", **settings)
    oracle = theirs(kind, "prompt_tuning", **settings)
    asked, options = ids(2, 6), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(generate(own, input_ids=asked, **options), _greedy(own, asked, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not torch.equal(oracle.generate(input_ids=asked, **options), _greedy(oracle, asked, 8))


@pytest.mark.parametrize(
    ("settings", "closest"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, "v_proj"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, "lm_head"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 7]}, "layers 0 to 1"),
    ],
    ids=["target_modules", "modules_to_save", "layers_to_transform"],
)
def test_interop_3_5_a_typo_is_silent(settings: dict[str, Any], closest: str) -> None:
    with pytest.raises(AdapterError, match=closest):
        inject(tiny("llama"), LoraConfig(**copy.deepcopy(settings)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        peft.get_peft_model(tiny("llama"), peft.LoraConfig(**copy.deepcopy(settings)))


def test_interop_3_7_families_without_default_targets() -> None:
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = SmolLM3ForCausalLM(SmolLM3Config(**sizes, **heads))
    assert LoraConfig().usual_targets("smollm3") == "all-linear"
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig())
    config = LoraConfig()
    inject(model, config)
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_interop_3_9_transformers_writes_no_rope_theta_and_merge_does(tmp_path: Path) -> None:
    """Readers that know only the older key, as mistral.rs 0.9.5, cannot read a config without it."""
    base = trainkit.base_folder()
    written = json.loads((base / "config.json").read_text())
    assert "rope_theta" in written["rope_parameters"]
    assert "rope_theta" not in written
    adapter = tmp_path / "adapter"
    model = trainkit.build("llama")
    inject(model, config := LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=str(base)))
    save_adapter(model, config, adapter)
    merge_adapter(str(adapter), tmp_path / "merged")
    merged = json.loads((tmp_path / "merged/config.json").read_text())
    assert merged["rope_theta"] == merged["rope_parameters"]["rope_theta"]
