"""PEFT's names over the core, so that code written for PEFT runs with its import changed.

``import peftcli.peft_api as peft`` is that import. ``namespaces.PEFT_NAMES`` says where each name lives, and
``namespaces`` which of PEFT's modules there are.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from peftcli.core.config import AdapterConfig, extend
from peftcli.peft_api.config import ConfigMethods
from peftcli.peft_api.namespaces import PEFT_NAMES, add_namespaces, stand_in_for_peft

__version__ = "0.21.2"
"""The version of PEFT whose names these are."""

__all__ = ["__version__", *sorted(PEFT_NAMES)]


def install(version: str | None = None) -> None:
    """Make ``import peft`` give these names, in this process, until it ends.

    Call it before libraries that import peft. ``peft.__version__`` is the version of PEFT whose names these are.

    Args:
        version: what ``importlib.metadata.version("peft")`` answers from now on, for libraries that demand one. It is
            the caller who says so. None: what is true, that peft is not installed, or in which version.

    Raises:
        AdapterError: the real peft has been imported, or a library has looked for it already. Nothing is changed then.
    """
    stand_in_for_peft(sys.modules[__name__], version)


def __getattr__(name: str) -> Any:
    if name not in PEFT_NAMES:
        raise AttributeError(f"module 'peftcli.peft_api' has no attribute {name!r}")
    return getattr(importlib.import_module(PEFT_NAMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, *globals()]


extend(AdapterConfig, ConfigMethods)
add_namespaces()
