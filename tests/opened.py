"""Parts of a base model, each by the model's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peftcli.models.open import open_base
from peftcli.schema import BaseModel


def load_model(base: BaseModel, auto_class: str, dtype: torch.dtype = torch.float32) -> Any:
    return open_base(base).model(auto_class, dtype).model


def empty_model(base: BaseModel, auto_class: str) -> Any:
    return open_base(base).empty_model(auto_class)


def load_config(base: BaseModel) -> Any:
    return open_base(base).config


def load_tokenizer(base: BaseModel, adapter: Path | None = None) -> Any:
    """The base model's tokenizer, or the one in the folder of an adapter."""
    return open_base(base, processors=adapter).processor("tokenizer")
