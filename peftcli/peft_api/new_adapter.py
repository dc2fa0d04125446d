"""A new adapter: its name, its tokenizer, its place in the model."""

from __future__ import annotations

import re
import warnings

from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.inject import inject
from peftcli.errors import AdapterError, PeftWarning
from peftcli.models.open import open_base
from peftcli.peft_api.mixed_batch import BASE
from peftcli.schema import BaseModel

_NAME = re.compile(r"[\w-]+")


def check_name(name: str) -> None:
    """Raises AdapterError for a name that could not be a folder's, or that means something else."""
    if not _NAME.fullmatch(name) or name == BASE:
        raise AdapterError(f"{name!r} is not a valid name; use letters, digits, - and _", key="adapter_name")


def start_adapter(model: nn.Module, config: AdapterConfig, name: str) -> None:
    """Put a new adapter into ``model``.

    Raises:
        AdapterError: a setting is missing that a recipe's training would find, or the config does not fit the model.
    """
    for key in config.found_by_training:
        if getattr(config, key) is None and not config.inference_mode:
            raise AdapterError("is needed: the number of optimizer steps of the whole training", key=key)
    named, base = config.base_model_name_or_path, getattr(model, "name_or_path", None)
    if base and named != base:
        if named is not None:
            warnings.warn(
                f"base_model_name_or_path is {base} now, the model's name; the config said {named}",
                PeftWarning,
                stacklevel=2,
            )
        config.base_model_name_or_path = base
    config.prepare(lambda name, **options: open_base(BaseModel(name=name or _name_of(model))).processor(**options))
    inject(model, config, name)


def _name_of(model: nn.Module) -> str:
    name = getattr(model, "name_or_path", None)
    if not name:
        raise AdapterError("the model does not say which tokenizer is its own", key="tokenizer_name_or_path")
    return str(name)
