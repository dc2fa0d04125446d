"""Stand in for the name ``peft``, for libraries that import it: ``peftcli.peft_api.install``."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from peftcli.errors import AdapterError
from peftcli.peft_api.namespaces import FILES, NAMESPACES

_LOOK_ONCE = ("transformers.trainer_utils", "diffusers.utils.import_utils")
"""Modules that look for peft when they are imported, and remember the answer."""
_FIRST = "call peftcli.peft_api.install() at the start, before other libraries are imported"


class _Peft(ModuleType):
    """The module ``peft``: the public names of ``peftcli.peft_api``, and those of PEFT's modules that are there."""

    def __init__(self, api: ModuleType):
        super().__init__("peft", api.__doc__)
        self.__file__, self.__all__ = api.__file__, api.__all__
        self.__path__: list[str] = []  # a package in which nothing is searched for
        self.__spec__ = ModuleSpec("peft", None, origin=api.__file__, is_package=True)
        self._api = api

    def __getattr__(self, name: str) -> Any:
        if name in self.__all__:
            return getattr(self._api, name)
        if f"peft.{name}" in sys.modules:
            return sys.modules[f"peft.{name}"]
        raise AttributeError(f"module 'peft', for which peftcli stands in, has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return list(self.__all__)


class _Distribution(importlib.metadata.Distribution):
    """What ``importlib.metadata`` says of peft: the version that the caller of ``install`` claims."""

    def __init__(self, version: str):
        self._text = f"Metadata-Version: 2.1\nName: peft\nVersion: {version}\nSummary: PEFT's names, by peftcli\n"

    def read_text(self, filename: str) -> str | None:
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{path}: peft is not installed; peftcli stands in for it")


class _Distributions(importlib.metadata.DistributionFinder):
    """Answers questions for peft by name. Lists of what is installed stay as they are."""

    version = ""

    def find_spec(self, *args: Any) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterator[Any]:
        if context is not None and context.name == "peft":
            yield _Distribution(self.version)


_distributions = _Distributions()


def stand_in_for_peft(api: ModuleType, version: str | None) -> None:
    """Do what ``peftcli.peft_api.install`` says, for ``api``, which is ``peftcli.peft_api``."""
    if not isinstance(sys.modules.get("peft"), _Peft):
        _check_nobody_has_looked()
        sys.modules["peft"] = _Peft(api)
        for path in (*FILES, *NAMESPACES):
            sys.modules[f"peft.{path}"] = importlib.import_module(f"{api.__name__}.{path}")
    if version is not None:
        _distributions.version = version
        if _distributions not in sys.meta_path:
            sys.meta_path.insert(0, _distributions)


def _check_nobody_has_looked() -> None:
    if "peft" in sys.modules:
        where = getattr(sys.modules["peft"], "__file__", None)
        raise AdapterError(f"peft has been imported already, from {where}", hint=_FIRST)
    looked = [name for name in _LOOK_ONCE if name in sys.modules]
    available = getattr(sys.modules.get("transformers.utils.import_utils"), "is_peft_available", None)
    if available is not None and available.cache_info().currsize and not available():
        looked.append("transformers")
    if looked:
        raise AdapterError(f"{looked[0]} has looked for peft already", hint=_FIRST)
