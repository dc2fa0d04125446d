"""LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention (https://arxiv.org/abs/2303.16199)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peftcli.core.config import AdapterConfig
from peftcli.guard.ranges import AT_LEAST_1
from peftcli.methods._settings import Problems


@dataclass(kw_only=True)
class AdaptionPromptConfig(AdapterConfig):
    """Settings of LLaMA-Adapter, under PEFT's names.

    Its gates start at zero, and the prompts learn only once these have moved, so the first steps do little.
    """

    peft_type = "ADAPTION_PROMPT"
    learning_rate = 2.7e-2
    is_adaption_prompt: ClassVar[bool] = True
    trains_in_inference_mode: ClassVar[bool] = True
    unknown_to_peft: ClassVar[tuple[str, ...]] = ("modules_to_save",)
    sizes: ClassVar[tuple[str, ...]] = ("adapter_len",)
    filled_later: ClassVar[tuple[str, ...]] = ("adapter_len", "adapter_layers", "target_modules")
    always_written: ClassVar[tuple[str, ...]] = ("adapter_len", "adapter_layers", "target_modules")

    adapter_len: int | None = field(default=None, metadata=AT_LEAST_1)
    """Trained vectors a layer, which every token attends to. They take no position of the context. Required."""
    adapter_layers: int | None = field(default=None, metadata=AT_LEAST_1)
    """How many layers have some, counted from the last. Required."""
    target_modules: str | None = None
    """Name of the attention modules, self_attn for one. Unset: found from the model."""

    def problems(self) -> Problems:
        given = {"adapter_len": self.adapter_len, "adapter_layers": self.adapter_layers}
        return super().problems() + [(key, "is required") for key, value in given.items() if value is None]

    def merge_problem(self) -> str | None:
        return "LLaMA-Adapter's vectors are attended to, which no weight does: it cannot be merged"
