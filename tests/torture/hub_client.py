"""``peftcli`` in a process of its own whose hub is one of the tests', or that has no network at all."""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub_server import TOKEN
from trainkit import Child

_CLONE_NEWNET = 0x40000000
_LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Seen:
    """What a user sees of a command, and what it did to the network."""

    code: int
    out: str
    err: str
    waits: list[float]
    """Seconds of each wait of half a second or more. None of them took time."""
    strangers: list[str]
    """Hosts beyond this machine that it asked for."""
    asking: float
    """Seconds that it waited for their addresses and connections."""

    @property
    def error(self) -> str:
        """The error and its hint: the log from ``error:`` on; empty without one."""
        _, found, message = self.err.rpartition("error: ")
        return message if found else ""


def peftcli(folder: Path, *args: object, **how: Any) -> Seen:
    """Run ``peftcli ARGS``, as ``start`` starts it."""
    child, record = start(folder, *args, **how)
    code = child.wait()
    noted = [json.loads(line) for line in record.read_text().splitlines()]
    waits = [entry["wait"] for entry in noted if "wait" in entry]
    asked = [entry for entry in noted if "stranger" in entry]
    strangers, seconds = [entry["stranger"] for entry in asked], sum(entry["seconds"] for entry in asked)
    return Seen(code, child.out, child.err, waits, strangers, seconds)


def start(
    folder: Path,
    *args: object,
    url: str = "",
    cache: Path | None = None,
    token: str = TOKEN,
    limit: float | None = None,
    network: bool = True,
    offline: bool = False,
) -> tuple[Child, Path]:
    """Start ``peftcli ARGS``. Returns the process, and the file where it notes its waits and whom it asks for.

    Args:
        folder: for what the process leaves.
        args: of the command line.
        url: of its hub; empty: the public one, which it cannot reach.
        cache: of the hub; by default one in ``folder``.
        token: that it is logged in with; empty: it is not.
        limit: seconds after which a silent connection counts as dead, in place of the usual ones.
        network: whether it has one. Without, it cannot even reach its own machine.
        offline: set HF_HUB_OFFLINE.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / f"network-{time.monotonic_ns()}.jsonl"
    record.touch()
    cache = cache or folder / "cache"
    before = functools.partial(_prepare, url, str(cache), str(record), limit, network, offline)
    env = {
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "PEFTCLI_CACHE": str(cache / "peftcli"),
        **({"HF_ENDPOINT": url} if url else {}),
    }
    return Child(folder, *args, env=env, before=before), record


def _prepare(url: str, cache: str, record: str, limit: float | None, network: bool, offline: bool) -> None:
    """What the environment decides when these libraries are imported, which the parent of this process has done."""
    import huggingface_hub
    from huggingface_hub import constants

    from peftcli.system import hub_requests

    constants.HF_HUB_CACHE = f"{cache}/hub"
    constants.HF_TOKEN_PATH = f"{cache}/token"
    constants.HF_HUB_OFFLINE = offline
    if url:
        constants.ENDPOINT = url
        constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
        huggingface_hub.hf_api.api.endpoint = url
    if (config := sys.modules.get("datasets.config")) is not None:
        config.HF_HUB_OFFLINE, config.HF_DATASETS_CACHE = offline, Path(cache, "datasets")
        if url:
            config.HF_ENDPOINT, config.HUB_DATASETS_URL = url, url + "/datasets/{repo_id}/resolve/{revision}/{path}"
    if limit is not None:
        hub_requests.READ_TIMEOUT = limit
    _note_waits(record)
    if not network:
        _leave_the_network()
    _note_strangers(record, answer=network)


def _note(record: str, **entry: Any) -> None:
    with Path(record).open("a") as file:
        file.write(json.dumps(entry) + "\n")


def _note_waits(record: str) -> None:
    really_sleep = time.sleep

    def sleep(seconds: float) -> None:
        if seconds < 0.5:
            return really_sleep(seconds)
        _note(record, wait=seconds)
        return really_sleep(0)

    time.sleep = sleep


def _note_strangers(record: str, *, answer: bool) -> None:
    """Write down who is asked for beyond this machine. With a network to ``answer``, have them be out of reach."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    @contextmanager
    def asked(host: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            _note(record, stranger=host, seconds=time.monotonic() - begun)

    def only_local(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX or address[0] in _LOCAL:
            return connect(self, address)
        with asked(str(address[0])):
            if answer:
                raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
            return connect(self, address)

    def look_up_local(host: Any, *args: Any, **options: Any) -> Any:
        if host in _LOCAL or host is None:
            return look_up(host, *args, **options)
        with asked(str(host)):
            if answer:
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
            return look_up(host, *args, **options)

    socket.socket.connect = only_local
    socket.getaddrinfo = look_up_local


def _leave_the_network() -> None:
    """Move to a network namespace without any device that is up; where that needs root, have every connection fail."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) == 0:
        return

    def unreachable(self: socket.socket, address: Any) -> None:
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    socket.socket.connect = unreachable
