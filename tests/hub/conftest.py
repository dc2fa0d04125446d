"""A hub on this machine for huggingface_hub's real client, and an adapter folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_folders import make_folder
from hub_server import TOKEN, Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that this process uses. Fails a test whose faults did not all happen."""
    from huggingface_hub import constants

    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name, value in {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)  # for the processes that a command starts
    yield server
    server.close()
    assert server.faults_left == 0


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between tries, none of which takes time."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder: the adapter, and much that is nobody else's business."""
    return make_folder(tmp_path / "run")
