"""Fine-tune large pretrained models by training few parameters."""

from __future__ import annotations

import importlib
from typing import Any

from peftcli.peft_api.namespaces import PEFT_NAMES

_CORE = {
    "peftcli.core.files": ("load_adapter", "save_adapter"),
    "peftcli.core.inject": ("disabled", "inject", "unload"),
    "peftcli.core.weights": ("adapter_state", "load_state"),
}
"""Module -> the public names that it holds."""

_PLACES = {**PEFT_NAMES, **{name: module for module, names in _CORE.items() for name in names}}

__all__ = ["__version__", *sorted(_PLACES)]


def __getattr__(name: str) -> Any:
    """Import a name's module when the name is first used, so that ``import peftcli`` loads no torch."""
    if name == "__version__":
        from importlib.metadata import version

        return version("peftcli")
    if name not in _PLACES:
        raise AttributeError(f"module 'peftcli' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return __all__
