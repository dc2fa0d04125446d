"""The table of methods. Readable without torch: a method's config module is imported on demand.

A new method is one folder (``config.py`` without torch, ``layers.py`` with it), one row here and one recipe.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from peftcli.core.config import AdapterConfig
from peftcli.errors import AdapterError


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    config: str
    """Config class, as ``module:Class`` below peftcli.methods."""
    peft_type: str
    """The method's name in adapter_config.json."""
    title: str
    """The method's name in a sentence."""
    summary: str
    paper: str
    peft_generates: bool = True
    """Whether PEFT, too, generates the right text with such an adapter."""

    def config_class(self) -> type[AdapterConfig]:
        """The method's config class. Imports no torch."""
        return getattr(importlib.import_module(f"peftcli.methods.{self.config_place}"), self.config_name)

    @property
    def config_place(self) -> str:
        """The config class's module below peftcli.methods."""
        return self.config.partition(":")[0]

    @property
    def config_name(self) -> str:
        """The config class's name."""
        return self.config.partition(":")[2]


METHODS: dict[str, Method] = {
    "lora": Method(
        "lora.config:LoraConfig",
        "LORA",
        "LoRA",
        "a low-rank update beside chosen layers",
        "https://arxiv.org/abs/2106.09685",
    ),
    "prompt_tuning": Method(
        "prompt_tuning.config:PromptTuningConfig",
        "PROMPT_TUNING",
        "prompt tuning",
        "trained virtual tokens before the input",
        "https://arxiv.org/abs/2104.08691",
        peft_generates=False,  # on transformers 5 it repeats the virtual tokens at each generated token
    ),
}


def config_from_dict(values: dict[str, Any], file: str | None = None) -> AdapterConfig:
    """The config that an ``adapter_config.json`` object describes.

    Raises:
        AdapterError: no such method, or its settings cannot be read.
    """
    for method in METHODS.values():
        if method.peft_type == values.get("peft_type"):
            return method.config_class().from_dict(values, file)
    known = ", ".join(method.peft_type for method in METHODS.values())
    raise AdapterError(f"no method is called {values.get('peft_type')!r}; known: {known}", key="peft_type", file=file)
