"""What the tests that follow PEFT's guides share: the library that runs them, and base models on disk."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import pytest
from models_tiny import tiny

LIBRARIES = [
    pytest.param("peftcli.peft_api", id="peftcli"),
    pytest.param("peft", marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore")]),
]
"""Ours, and PEFT, which shows that a test asks for what PEFT does."""


@pytest.fixture(params=LIBRARIES)
def lib(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Returns the folder of a tiny base model of a kind."""
    folders: dict[str, str] = {}

    def folder(kind: str) -> str:
        if kind not in folders:
            folders[kind] = str(tmp_path_factory.mktemp(kind))
            tiny(kind).save_pretrained(folders[kind])
        return folders[kind]

    return folder
