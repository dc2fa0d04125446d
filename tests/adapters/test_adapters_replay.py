"""Programs that are installed say what peftcli says, on tiny models of each family.

They come in no extra: ``pip install xllamacpp mistralrs mlx-lm mlx-cpu``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from peftcli.adapters.export.write import export_adapter
from peftcli.core.files import save_adapter
from peftcli.core.inject import inject
from peftcli.methods import config_from_dict

pytestmark = pytest.mark.slow
_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_WINDOW = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32}
_GPT2 = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "eos_token_id": 2}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)),
    "llama3": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=True, rope_parameters=_LLAMA3)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=None, head_dim=16)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**_SIZES | {"num_hidden_layers": 4})),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=32)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_SIZES, head_dim=32)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_SIZES, **_WINDOW)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_SIZES | {"num_hidden_layers": 7}, **_WINDOW)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
}


def make_adapter(folder: Path, family: str, **settings: Any) -> Path:
    """A LoRA of random weights on a tiny model whose answers are far from ties."""
    torch.manual_seed(4)
    model, base = FAMILIES[family](), folder / "base"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(0.05 * torch.randn_like(parameter))
            if "embed_tokens" in name or "lm_head" in name or "wte" in name:
                parameter[0] = 0  # the pad token, at which llama.cpp stops by its name
    model.save_pretrained(base)
    trainkit.tokenizer().save_pretrained(base)
    described = json.loads((base / "config.json").read_text())
    described["rope_theta"] = (described.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    (base / "config.json").write_text(json.dumps(described))  # as in models on the hub, for mlx-lm and mistral.rs
    given: dict[str, Any] = {"peft_type": "LORA", "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    given |= {"r": 8, "lora_alpha": 32} if "peft_type" not in settings else {}
    config = config_from_dict({**given, **settings, "base_model_name_or_path": str(base)})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    inject(model, config)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    save_adapter(model, config, folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize("form", ["gguf", "merged-gguf"])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_says_the_same(tmp_path: Path, family: str, form: Any) -> None:
    pytest.importorskip("xllamacpp")
    adapter = make_adapter(tmp_path, family, use_rslora=True)
    found = export_adapter(str(adapter), tmp_path / "out", form=form, numbers="f32")["replayed"]
    assert (found["same_prompts"] + found["normalised"], found["same_answers"]) == (25, 6)


@pytest.mark.parametrize(("program", "module"), [("mlx", "mlx_lm"), ("mistralrs", "mistralrs")])
def test_others_say_the_same(tmp_path: Path, program: str, module: str) -> None:
    pytest.importorskip(module)
    adapter = make_adapter(tmp_path, "llama", use_rslora=True)
    found = export_adapter(str(adapter), tmp_path / "out", program=program)["replayed"]
    assert (found["same_prompts"], found["same_answers"]) == (25, 6)
