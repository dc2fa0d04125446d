"""Two hosts on one machine, and a run on both: network namespaces with addresses of their own, joined by a cable.

Linux only, and as root.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import trainkit
from trainkit import read_metrics

PORT = 29_400
_count = itertools.count()


@dataclass(frozen=True)
class Host:
    """A network namespace."""

    name: str
    address: str
    cable: str
    """Its end of it."""

    def unplug(self) -> None:
        """Pull the cable: nothing comes or goes, and nobody is told."""
        _ip("-n", self.name, "link", "set", self.cable, "down")

    def plug(self) -> None:
        """Put the cable back."""
        _ip("-n", self.name, "link", "set", self.cable, "up")

    def sent(self) -> int:
        """Bytes that have left it by the cable."""
        (cable,) = json.loads(_ip("-n", self.name, "-s", "-j", "link", "show", self.cable))
        return int(cable["stats64"]["tx"]["bytes"])

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
    hosts = [
        Host(f"peftcli-{short}-{each}", f"10.{77 + number % 100}.0.{place}", f"pe{short}-{each}")
        for each, place in enumerate((9, 10))
    ]
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        _ip("link", "add", hosts[0].cable, "type", "veth", "peer", "name", hosts[1].cable)
        for host in hosts:
            _ip("link", "set", host.cable, "netns", host.name)
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.cable)
            host.plug()
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


@dataclass
class Pair:
    """Two hosts that see the base model, the data and no more of each other's files."""

    hosts: tuple[Host, Host]
    recipe: Path
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def folder(self, rank: int) -> Path:
        """The run folder of a host."""
        folder = self.recipe.parent / f"host-{rank}"
        folder.mkdir(exist_ok=True)
        return folder / "out"

    def start(self, rank: int, *settings: str, number: int | None = None) -> subprocess.Popen[str]:
        """Start the command on a host."""
        launch = {
            "num_processes": 1,
            "num_machines": 2,
            "machine_rank": rank if number is None else number,
            "main_process_ip": self.hosts[0].address,
            "main_process_port": PORT,
        }
        return self.run(rank, [f"launch.{name}={value}" for name, value in launch.items()] + list(settings))

    def run(
        self, rank: int, settings: list[str], by: Sequence[str] = (), env: Mapping[str, str] = MappingProxyType({})
    ) -> subprocess.Popen[str]:
        """Start ``peftcli train`` on a host, by a launcher or with a scheduler's variables."""
        words = ["training.per_device_train_batch_size=2", f"training.output_dir={self.folder(0)}", *settings]
        process = self.hosts[rank].start(
            [sys.executable, *by, "-m", "peftcli", "train", str(self.recipe), *words, "--json"],
            self.folder(1 - rank).parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=trainkit.subprocess_environment() | {"PEFTCLI_CACHE": str(self.recipe.parent / f"cache-{rank}"), **env},
        )
        self.running.append(process)
        return process

    def both(self, *settings: str) -> list[subprocess.Popen[str]]:
        """Start it on both."""
        return [self.start(rank, *settings) for rank in (0, 1)]

    def wait_for_step(self, step: int) -> None:
        """Wait until so many steps are logged."""
        end = time.monotonic() + 120
        while not any(entry["step"] >= step for entry in self.lines()):
            assert time.monotonic() < end
            assert all(each.poll() is None for each in self.running[-2:])
            time.sleep(0.05)

    def lines(self) -> list[dict[str, Any]]:
        """What is logged."""
        return read_metrics(self.folder(0)) if (self.folder(0) / "metrics.jsonl").exists() else []

    def adapter(self) -> bytes:
        """The trained adapter."""
        return (self.folder(0) / "adapter_model.safetensors").read_bytes()


def ended(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """What a process has printed, which ends so."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    return out, err


def processes_of(launcher: subprocess.Popen[str]) -> list[int]:
    """The training processes on the host of a command (``ip`` has become the command itself)."""
    return [int(each) for each in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


@contextmanager
def made_pair(recipe: Path) -> Iterator[Pair]:
    """Inside there are two hosts for a recipe; afterwards nothing runs on them."""
    with two_hosts() as hosts:
        found = Pair(hosts, recipe)
        try:
            yield found
        finally:
            for process in found.running:
                if process.poll() is None:
                    process.kill()
                if process.stdout and not process.stdout.closed:
                    process.communicate()
