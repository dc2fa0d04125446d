"""The base of the configs of all soft prompts. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peftcli.core.config import AdapterConfig
from peftcli.errors import AdapterError

AFTER_PADDING: set[str] = set()
"""Families of models that count positions from the one after the pad token's id. ``peftcli.methods`` fills it."""


@dataclass(kw_only=True)
class SoftPromptConfig(AdapterConfig):
    """A config of a method that trains virtual tokens."""

    is_prompt_learning: ClassVar[bool] = True
    trains_in_inference_mode: ClassVar[bool] = True
    file_prefix: ClassVar[str] = "base_model."
    sizes: ClassVar[tuple[str, ...]] = ("num_virtual_tokens",)
    always_written: ClassVar[tuple[str, ...]] = ("num_virtual_tokens", "token_dim", "num_transformer_submodules")

    num_virtual_tokens: int = field(default=20, metadata={"nullable": True})  # as PEFT writes it where it is unset
    """How many virtual tokens stand before the input. Each costs one position of the context."""
    token_dim: int | None = field(default=None, metadata={"recipe": False})
    """Size of the base model's input embedding; of a prefix, that of a layer's keys. Found from the model."""
    num_layers: int | None = field(default=None, metadata={"recipe": False})
    """Number of layers. Of a prefix, found from the model; elsewhere PEFT writes it, and it changes nothing."""
    num_attention_heads: int | None = field(default=None, metadata={"recipe": False})
    """The same of the heads, in a prefix of those that have keys of their own."""
    num_transformer_submodules: int | None = field(default=None, metadata={"recipe": False})
    """2 for a prefix in an encoder-decoder, as PEFT has it: the decoder's layer i then sees pair 2 i of keys and
    values, counted on from the first after the last. 1 elsewhere: PEFT's 2 allocates rows that get no gradient, or puts
    a second prompt before a decoder, which its generate leaves out."""

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        if self.num_virtual_tokens < 1:
            found.append(("num_virtual_tokens", f"must be at least 1, not {self.num_virtual_tokens}"))
        return found

    def check_room(self, model: Any) -> None:
        """Raise AdapterError if the virtual tokens leave the model no position for the input."""
        if not hasattr(model, "config"):
            raise AdapterError(f"virtual tokens go into models of transformers; {type(model).__name__} is not one")
        limit = max_positions(model.config)
        if limit is not None and self.num_virtual_tokens >= limit:
            raise AdapterError(
                f"{self.num_virtual_tokens} leaves no room for the input; the base model has {limit} positions",
                key="num_virtual_tokens",
            )

    def merge_problem(self) -> str | None:
        return "virtual tokens cannot be merged into weights; load the adapter beside its base model instead"


@dataclass(kw_only=True)
class EmbeddedPromptConfig(SoftPromptConfig):
    """A config of a method whose virtual tokens are vectors in the place of token embeddings."""

    def fit(self, embedding: Any) -> int:
        """Return the size of the input embedding, and write it into the config.

        Raises:
            AdapterError: the file's is another.
        """
        width = int(embedding.weight.shape[1])
        if self.token_dim is not None and self.token_dim != width:
            raise AdapterError(f"the adapter's is {self.token_dim}, the base model's {width}", key="token_dim")
        self.token_dim, self.num_transformer_submodules = width, 1
        return width


@dataclass(kw_only=True)
class PrefixConfig(SoftPromptConfig):
    """A config of a method whose virtual tokens are keys and values in every attention layer."""

    always_written: ClassVar[tuple[str, ...]] = (*SoftPromptConfig.always_written, "num_layers", "num_attention_heads")


def max_positions(config: Any, virtual_tokens: int = 0) -> int | None:
    """Return how many tokens a model of transformers with this config has positions for; None: no limit is known.

    ``virtual_tokens`` take some of them, unless ``check_room`` refuses that many.
    """
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if limit is None or limit <= 0:  # XLNet, which has no limit, says -1
        return None
    after_padding = getattr(config, "model_type", None) in AFTER_PADDING and config.pad_token_id is not None
    if after_padding and getattr(config, "position_embedding_type", None) != "rotary":  # ESM-2 has no table of them
        limit -= config.pad_token_id + 1
    return limit - virtual_tokens if virtual_tokens < limit else limit
