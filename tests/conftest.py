"""What every test has: no network, no user's cache or token, one thread, no display; and grids, see grid.py."""

from __future__ import annotations

import gc
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
from grid import mark_slow
from hypothesis import HealthCheck, settings

# Read when torch, huggingface_hub and matplotlib are first imported, so they are set before any test module is.
_HF_HOME = tempfile.mkdtemp(prefix="peftcli-tests-")
os.environ.update(
    HF_HOME=_HF_HOME,
    PEFTCLI_CACHE=f"{_HF_HOME}/peftcli",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
    os.environ.pop(_name, None)

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")  # the machine may be


@pytest.fixture(scope="session")
def tokenizers() -> Callable[..., Any]:
    """Makes a tokenizer with the chat template of that name; each kind is built once."""
    from chat_templates import make_tokenizer

    built: dict[tuple[Any, ...], Any] = {}

    def get(template: str | None = None, **options: Any) -> Any:
        key = (template, *sorted(options.items()))
        if key not in built:
            built[key] = make_tokenizer(template, **options)
        return built[key]

    return get


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_slow(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()  # what was imported and collected stays: looking through it takes 3 % of the time
    if "trainkit" in sys.modules and session.items and not session.config.option.collectonly:
        sys.modules["trainkit"].fork_server()


def pytest_unconfigure() -> None:
    shutil.rmtree(_HF_HOME, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> None:
    """Nothing here loses power, and a short run waits a third of its time. Processes that tests start do wait."""
    os.fsync = lambda handle: None


@pytest.fixture(autouse=True)
def _local_network_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections beyond this machine fail at once, except in tests marked ``network``."""
    if request.node.get_closest_marker("network") is None:
        connect = socket.socket.connect

        def local_only(self: socket.socket, address: Any) -> None:
            if self.family != socket.AF_UNIX and address[0] not in ("localhost", "127.0.0.1", "::1"):
                raise OSError(f"a test tried to reach {address}; mark it `network` or serve it on 127.0.0.1")
            connect(self, address)

        monkeypatch.setattr(socket.socket, "connect", local_only)
