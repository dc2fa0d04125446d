"""Two hosts on one machine: network namespaces with addresses of their own, joined by a cable (Linux, as root)."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_count = itertools.count()


@dataclass(frozen=True)
class Host:
    """A network namespace."""

    name: str
    address: str

    def start(self, command: list[str], hidden: Path, **options: Any) -> subprocess.Popen[str]:
        """Start a command on this host, which sees nothing of what is in the folder ``hidden``."""
        hide = ["sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(hidden)]  # for this command alone
        return subprocess.Popen(["ip", "netns", "exec", self.name, *hide, *command], text=True, **options)


def can_make_hosts() -> bool:
    """Whether this user may make network namespaces here."""
    if os.geteuid() or shutil.which("ip") is None:
        return False
    name = f"peftcli-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        _ip("netns", "del", name)
    return made


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Inside there are two hosts, of which each reaches the other and nobody else."""
    number = next(_count)
    short = f"{os.getpid() % 100_000}-{number}"
    # the first has the larger address, and that of the other comes first as text
    hosts = [Host(f"peftcli-{short}-{each}", f"10.{77 + number % 100}.0.{place}") for each, place in enumerate((9, 10))]
    cable = [f"pe{short}-{each}" for each in range(2)]
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        _ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for host, end in zip(hosts, cable, strict=True):
            _ip("link", "set", end, "netns", host.name)
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", end)
            _ip("-n", host.name, "link", "set", end, "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            if Path("/var/run/netns", host.name).exists():
                for pid in _ip("netns", "pids", host.name).split():  # what a launcher that was killed has left
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                _ip("netns", "del", host.name)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
