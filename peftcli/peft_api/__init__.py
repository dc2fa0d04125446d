"""PEFT's names over the core, so that code written for PEFT runs with its import changed.

``import peftcli.peft_api as peft`` is that import. ``peftcli.PEFT_NAMES`` says where each name lives, and
``namespaces`` which of PEFT's modules there are.
"""

from __future__ import annotations

import importlib
from typing import Any

import peftcli.peft_api.task_models  # noqa: F401 - registers the model class of each task
from peftcli import PEFT_NAMES
from peftcli.peft_api.namespaces import add_namespaces

__version__ = "0.21.2"
"""The version of PEFT whose names these are."""

__all__ = ["__version__", *sorted(PEFT_NAMES)]


def __getattr__(name: str) -> Any:
    if name not in PEFT_NAMES:
        raise AttributeError(f"module 'peftcli.peft_api' has no attribute {name!r}")
    return getattr(importlib.import_module(PEFT_NAMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, *globals()]


add_namespaces()
