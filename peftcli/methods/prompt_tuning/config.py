"""The settings of prompt tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftcli.core.config import AdapterConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from peftcli.core.layer import AdapterLayer


@dataclass(kw_only=True)
class PromptTuningConfig(AdapterConfig):
    """Settings of prompt tuning, under PEFT's names."""

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    file_prefix: ClassVar[str] = "base_model."
    always_written: ClassVar[tuple[str, ...]] = ("num_virtual_tokens", "token_dim", "num_transformer_submodules")
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"tokenizer_kwargs": (None,)}

    num_virtual_tokens: int = 20
    """How many trained vectors stand before the input. Each costs one position of the context."""
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"
    """How the vectors start. RANDOM: normal; SAMPLE_VOCAB: embeddings of random tokens of the vocabulary;
    TEXT: embeddings of prompt_tuning_init_text, which learns fastest."""
    prompt_tuning_init_text: str | None = None
    """The text that prompt_tuning_init: TEXT starts from, repeated or cut to num_virtual_tokens."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer of prompt_tuning_init_text. Unset: the base model's."""
    token_dim: int | None = field(default=None, metadata={"recipe": False})
    """Size of the base model's input embedding. Found from the model."""
    num_layers: int | None = field(default=None, metadata={"recipe": False})
    """PEFT writes the base model's number of layers here. It changes nothing."""
    num_attention_heads: int | None = field(default=None, metadata={"recipe": False})
    """PEFT writes the base model's number of heads here. It changes nothing."""
    num_transformer_submodules: int | None = field(default=None, metadata={"recipe": False})
    """Always 1 as written: PEFT's 2 for seq2seq allocates rows that get no gradient."""

    init_token_ids: list[int] | None = field(default=None, metadata={"recipe": False, "file": False}, repr=False)
    """Token ids of prompt_tuning_init_text, as ``prepare`` finds them."""

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        if self.num_virtual_tokens < 1:
            found.append(("num_virtual_tokens", f"must be at least 1, not {self.num_virtual_tokens}"))
        if self.prompt_tuning_init not in ("RANDOM", "SAMPLE_VOCAB", "TEXT"):
            found.append(
                ("prompt_tuning_init", f"must be RANDOM, SAMPLE_VOCAB or TEXT, not {self.prompt_tuning_init!r}")
            )
        if self.prompt_tuning_init == "TEXT" and not self.prompt_tuning_init_text and not self.inference_mode:
            found.append(("prompt_tuning_init_text", "prompt_tuning_init: TEXT needs it"))
        return found

    def prepare(self, load_tokenizer: Callable[[str | None], Any]) -> None:
        if self.prompt_tuning_init == "TEXT":
            tokenizer = load_tokenizer(self.tokenizer_name_or_path)
            self.init_token_ids = tokenizer(self.prompt_tuning_init_text)["input_ids"]

    def targets(self, model: nn.Module) -> list[str]:
        from peftcli.core.prompt import input_embedding_name

        return [input_embedding_name(model)]

    def wrap(self, module: nn.Module, name: str) -> AdapterLayer:
        from peftcli.methods.prompt_tuning.layers import wrap

        return wrap(module, self)

    def attach(self, model: nn.Module, layers: dict[str, AdapterLayer]) -> None:
        from peftcli.core.prompt import insert_virtual_tokens

        insert_virtual_tokens(model)

    def merge_problem(self) -> str | None:
        return "virtual tokens cannot be merged into weights; load the adapter beside its base model instead"
