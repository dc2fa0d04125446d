"""Load a base model, its config and its tokenizer by their names. Use ``open_base`` instead."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.models import validate
from peftcli.models.guarded import translated_errors
from peftcli.models.open import OpenBase
from peftcli.models.open import base_of as base_of
from peftcli.schema import BaseModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_model(base: BaseModel, auto_class: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load the base model."""
    return OpenBase(base).model(auto_class, dtype).model


def stored_or_asked(base: BaseModel) -> dict[str, Any] | None:
    """How the weights are quantised."""
    return OpenBase(base).quantization


def empty_model(base: BaseModel, auto_class: str) -> PreTrainedModel:
    """Build the base model on the meta device."""
    return OpenBase(base).empty_model(auto_class)


def load_config(base: BaseModel) -> PreTrainedConfig:
    """Load the base model's config."""
    return OpenBase(base).config


def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer."""
    tokenizer: PreTrainedTokenizerBase = OpenBase(base).processor("tokenizer")
    return tokenizer


def load_adapter_tokenizer(folder: Path, base: BaseModel) -> PreTrainedTokenizerBase:
    """Load the adapter's tokenizer, else the base model's."""
    from transformers import AutoTokenizer

    validate.check_folder(folder)
    if not has_tokenizer(folder):
        return load_tokenizer(base)
    with translated_errors(str(folder)):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether an adapter folder holds a tokenizer."""
    return (folder / "tokenizer_config.json").is_file()


def base_file(base: BaseModel, name: str) -> Path | None:
    """Find one of the base model's small files."""
    return OpenBase(base).file(name)


def base_files(base: BaseModel) -> list[Path]:
    """Find the base model's safetensors files."""
    return OpenBase(base).shards()
