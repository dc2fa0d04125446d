"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning (https://arxiv.org/abs/2104.08691)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from peftcli.core.prompts.config import EmbeddedPromptConfig


@dataclass(kw_only=True)
class TextPromptConfig(EmbeddedPromptConfig):
    """A config of a method whose virtual tokens can start as the embeddings of a text."""

    prompt_tuning_init: str

    prompt_tuning_init_text: str | None = field(default=None, metadata={"prose": True})
    """The text that prompt_tuning_init: TEXT starts from, repeated or cut to num_virtual_tokens."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer of prompt_tuning_init_text. Unset: the base model's."""
    tokenizer_kwargs: dict[str, Any] | None = field(default=None, metadata={"recipe": False})
    """Options of that tokenizer's from_pretrained."""

    init_token_ids: list[int] | None = field(default=None, metadata={"recipe": False, "file": False}, repr=False)
    """Token ids of prompt_tuning_init_text, as ``prepare`` finds them."""

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        if self.prompt_tuning_init == "TEXT" and not self.prompt_tuning_init_text and not self.inference_mode:
            found.append(("prompt_tuning_init_text", "prompt_tuning_init: TEXT needs it"))
        if self.tokenizer_kwargs and self.prompt_tuning_init != "TEXT":
            found.append(("tokenizer_kwargs", "means nothing without prompt_tuning_init: TEXT"))
        if self.tokenizer_kwargs and "trust_remote_code" in self.tokenizer_kwargs:
            found.append(("tokenizer_kwargs", "trust_remote_code is not taken: no code of the hub is run for a prompt"))
        return found

    def prepare(self, load_tokenizer: Callable[..., Any]) -> None:
        if self.prompt_tuning_init == "TEXT":
            tokenizer = load_tokenizer(self.tokenizer_name_or_path, **(self.tokenizer_kwargs or {}))
            self.init_token_ids = tokenizer(self.prompt_tuning_init_text)["input_ids"]

    def file_dict(self) -> dict[str, Any]:
        out = super().file_dict()
        if self.prompt_tuning_init == "TEXT" and not self.tokenizer_name_or_path and self.base_model_name_or_path:
            out["tokenizer_name_or_path"] = self.base_model_name_or_path  # PEFT reads no TEXT without one
        return out


@dataclass(kw_only=True)
class PromptTuningConfig(TextPromptConfig):
    """Settings of prompt tuning, under PEFT's names."""

    peft_type = "PROMPT_TUNING"
    learning_rate = 2e-2

    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"
    """How the vectors start. RANDOM: normal; SAMPLE_VOCAB: embeddings of random tokens of the vocabulary;
    TEXT: embeddings of prompt_tuning_init_text, which learns fastest."""
