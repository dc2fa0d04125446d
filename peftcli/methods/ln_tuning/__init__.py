"""LN tuning: Tuning LayerNorm in Attention (https://arxiv.org/abs/2312.11420)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftcli.core.config import ExcludingConfig
from peftcli.methods._settings import Problems

_AROUND_LAYERS = ["input_layernorm", "post_attention_layernorm"]
_GEMMA = [*_AROUND_LAYERS, "pre_feedforward_layernorm", "post_feedforward_layernorm", "norm"]
TARGETS: dict[str, list[str]] = {
    "bart": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"],
    "bloom": [*_AROUND_LAYERS, "ln_f"],
    "falcon": [*_AROUND_LAYERS, "ln_f"],
    "gemma": [*_AROUND_LAYERS, "norm"],
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "gptj": ["ln_1", "ln_f"],
    "llama": [*_AROUND_LAYERS, "norm"],
    "mistral": [*_AROUND_LAYERS, "norm"],
    "mt5": ["layer_norm", "final_layer_norm"],
    "phi": ["input_layernorm", "final_layernorm"],
    "qwen2": ["post_attention_layernorm"],
    "qwen3": ["post_attention_layernorm"],
    "t5": ["layer_norm", "final_layer_norm"],
}
"""What PEFT trains by default, per model_type."""


@dataclass(kw_only=True)
class LNTuningConfig(ExcludingConfig):
    """Settings of LN tuning, under PEFT's names. Its target_modules are the norms to train, by default all of them."""

    peft_type = "LN_TUNING"
    learning_rate = 5e-3
    adapts_attention: ClassVar[bool] = True
    as_sets: ClassVar[tuple[str, ...]] = ()
    always_written: ClassVar[tuple[str, ...]] = ("target_modules",)

    def problems(self) -> Problems:
        found = super().problems()
        if self.target_modules == "all-linear":
            found.append(("target_modules", "all-linear names no norm"))
        return found
