"""The cores that a process may use, and how long its threads wait for one another."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peftcli.cli.app import main
from peftcli.system import cores
from peftcli.system.cores import usable_cores

GROUPS = {
    "none": ("0::/", {}, 8),
    "version 2": ("0::/jobs/mine", {"jobs/cpu.max": "250000 100000", "jobs/mine/cpu.max": "max 100000"}, 2),
    "version 2, seen from a container": ("0::/jobs/mine", {"cpu.max": "50000 100000"}, 1),
    "version 1": (
        "9:name=systemd:/mine\n4:cpu,cpuacct:/mine",
        {"cpu,cpuacct/mine/cpu.cfs_quota_us": "300000", "cpu,cpuacct/mine/cpu.cfs_period_us": "100000"},
        3,
    ),
    "version 1, no limit": (
        "1:cpu:/",
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
        8,
    ),
}
"""/proc/self/cgroup, files of the groups, and the cores that they leave of 8."""


@pytest.mark.parametrize("kind", GROUPS)
def test_a_control_group_leaves_fewer_cores(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, files, expected = GROUPS[kind]
    for name, content in ({"self": own} | files).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    monkeypatch.setattr(cores, "_OWN", tmp_path / "self")
    monkeypatch.setattr(cores, "_GROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cores() == expected


VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")


@pytest.mark.parametrize(
    ("own", "then"),
    [
        ({}, (None, "1000", "64", "64")),
        ({"OMP_WAIT_POLICY": "ACTIVE", "LRU_CACHE_CAPACITY": "9"}, ("ACTIVE", None, "9", "64")),
        ({"GOMP_SPINCOUNT": "7", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8"}, (None, "7", "64", "8")),
    ],
)
def test_variables_for_torch_are_set_unless_the_user_sets_them(
    own: dict[str, str], then: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    monkeypatch.setattr(os, "environ", others | own)
    monkeypatch.setattr(cores, "_others_run", lambda: False)
    main(["--version"])
    assert tuple(map(os.environ.get, VARIABLES)) == then


@pytest.mark.parametrize(("load", "spins"), [("0.9 0.5 0.5 1/90 7", "1000"), ("0.0 0.1 0.1 3/90 7", "0"), ("", "1000")])
def test_threads_wait_shortly_where_others_want_the_cores(
    load: str, spins: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loadavg").write_text(load)
    monkeypatch.setattr(cores, "_LOAD", tmp_path / "loadavg")
    monkeypatch.setattr(cores, "usable_cores", lambda: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in VARIABLES})
    cores.set_variables()
    assert os.environ["GOMP_SPINCOUNT"] == spins
