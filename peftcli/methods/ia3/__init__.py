"""(IA)^3: Few-Shot Parameter-Efficient Fine-Tuning (https://arxiv.org/abs/2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftcli.core.config import ExcludingConfig, FanInConfig
from peftcli.methods._settings import Problems

TARGETS: dict[str, tuple[list[str], list[str]]] = {
    "bart": (["q_proj", "v_proj"], ["fc2"]),
    "bert": (["key", "value"], ["output.dense"]),
    "bloom": (["query_key_value"], ["mlp.dense_4h_to_h"]),
    "deberta": (["in_proj"], ["output.dense"]),
    "deberta-v2": (["key_proj", "value_proj"], ["output.dense"]),
    "falcon": (["query_key_value"], ["dense_4h_to_h"]),
    "gemma": (["q_proj", "v_proj"], ["down_proj"]),
    "gemma2": (["q_proj", "v_proj"], ["down_proj"]),
    "gemma3_text": (["q_proj", "v_proj"], ["down_proj"]),
    "gpt2": (["c_attn"], ["mlp.c_proj"]),
    "gpt_bigcode": (["c_attn"], ["mlp.c_proj"]),
    "gpt_neo": (["q_proj", "v_proj"], ["c_proj"]),
    "gpt_neox": (["query_key_value"], ["dense_4h_to_h"]),
    "gptj": (["q_proj", "v_proj"], ["fc_out"]),
    "llama": (["k_proj", "v_proj"], ["down_proj"]),
    "llama4": (["q_proj", "v_proj"], ["down_proj"]),
    "mistral": (["k_proj", "v_proj"], ["down_proj"]),
    "mixtral": (["k_proj", "v_proj"], []),  # its experts' w2, which PEFT names too, is no module of its own any more
    "mt5": (["k", "v", "wi_1"], []),
    "opt": (["q_proj", "k_proj"], ["fc2"]),
    "phi": (["q_proj", "v_proj"], ["fc2"]),
    "qwen2": (["q_proj", "v_proj"], ["down_proj"]),
    "qwen3": (["q_proj", "v_proj"], ["down_proj"]),
    "roberta": (["key", "value"], ["output.dense"]),
    "t5": (["k", "v"], ["wo"]),
}
"""What PEFT adapts by default, per model_type: modules scaled at their outputs, and at their inputs."""


@dataclass(kw_only=True)
class IA3Config(FanInConfig, ExcludingConfig):
    """Settings of (IA)^3, under PEFT's names."""

    peft_type = "IA3"
    learning_rate = 1e-2
    as_sets: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules", "feedforward_modules")
    always_written: ClassVar[tuple[str, ...]] = ("target_modules", "feedforward_modules")

    feedforward_modules: list[str] | str | None = None
    """Which of the adapted modules have their inputs scaled, not their outputs, written as target_modules are.
    Unset: the second layer of the MLP, for the families that we know."""
    init_ia3_weights: bool = True
    """Start from factors of one; false starts at random, for tests."""

    def problems(self) -> Problems:
        found = super().problems()
        if isinstance(self.target_modules, set) and isinstance(self.feedforward_modules, set):
            strange = sorted(self.feedforward_modules - self.target_modules)
            found += [("feedforward_modules", f"{name!r} is not in target_modules") for name in strange[:1]]
        return found

    def usual_targets(self, model_type: str) -> list[str] | str:
        outputs, inputs = TARGETS.get(model_type, ([], []))
        return [*outputs, *inputs] or "all-linear"
