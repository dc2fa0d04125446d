"""Saves on a disk that fails: an error at every system call, and a small disk that is full.

The run must end with 7 and one message, leave nothing half under a final name and the checkpoints whole, and go on to
the same bytes once the disk is well.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import subprocess
import unittest
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import kills
import strace
from campaigns import Campaign, Trial
from kills import LORA, RESUMED, Program
from trainkit import Child, read_run

_REMOVES = ("unlink", "unlinkat", "rmdir")
_RUNNING_ON = ("metrics.jsonl", ".lock", "train.log")
"""What grows in place."""


def check_stopped(program: Program, child: Child, folder: Path, out: Path | None = None) -> None:
    """That a run on a bad disk ended as promised.

    Args:
        program: What ran.
        child: The run, ended.
        folder: Its folder.
        out: Where its run folder is seen, if not there.
    """
    out = out or folder / "out"
    code, errors = child.wait(), [line for line in child.err.splitlines() if line.startswith("error: ")]
    assert code == 7, f"ended with {code}, not 7:\n{child.err}"
    assert len(errors) == 1, f"{len(errors)} messages, not one:\n{child.err}"
    assert "Traceback" not in child.err, child.err
    assert str(folder / "out") in errors[0], f"the message does not name the path: {errors[0]}"
    whole = kills.uninterrupted(program).folder
    for path in out.iterdir() if out.exists() else ():
        if path.name == "checkpoints":
            known = kills.DAMAGED if program is RESUMED else ""
            damaged = [kills.damage(each) for each in path.glob("step-*") if each.name != known]
            assert not any(damaged), "; ".join(filter(None, damaged))
        elif path.name == "run.json":
            json.loads(path.read_text())
        elif not path.name.startswith(".") and path.name not in _RUNNING_ON:
            expected = (whole / "out" / path.name).read_bytes().replace(str(whole).encode(), str(folder).encode())
            assert path.read_bytes() == expected, f"{path.name} is half a file"


# --- an error at one call ---------------------------------------------------------------------------------------------


def fail_at(program: Program, error: str, point: strace.Point, folder: Path) -> None:
    """Let one call fail, then run again."""
    child = strace.inject(program.start, folder, point, f"error={error}")
    code = child.wait()
    if program is LORA and point in kills.of_saves(kills.points(LORA)):
        run = read_run(folder / "out")
        said = (run["status"], run["exit_code"])
        assert said == (("failed", 7) if code else ("complete", 0)), f"ended with {code}, and run.json says {said}"
        standing = {path.name for path in (folder / "out/checkpoints").glob("step-*")}
        assert "step-000006" in standing, f"the checkpoint before is lost; {', '.join(standing) or 'none'} stands"
    exists = (point.syscall, point.path) == ("mkdir", "out")
    if code or not (_removes(point) or exists):  # an old checkpoint that cannot be deleted need not stop a run
        check_stopped(program, child, folder)
    program.finish(folder)


def _removes(point: strace.Point) -> bool:
    """Whether the call deletes something: a checkpoint is renamed before."""
    return point.syscall in _REMOVES or (
        point.syscall.startswith("rename") and point.path.startswith("out/checkpoints/step-")
    )


def _faults(calls: kills.Calls) -> list[Trial]:
    """ENOSPC and EIO at each call, EDQUOT and EROFS at some."""
    trials = []
    for number in range(calls.count):
        for error in ("ENOSPC", "EIO", *(("EDQUOT",) if number % 8 == 0 else ("EROFS",) if number % 8 == 4 else ())):
            fault = functools.partial(fail_at, calls.program, error)
            trials.append(Trial(f"{error} at call {number + 1}", functools.partial(calls.each, number, fault)))
    return trials


# --- a full disk ------------------------------------------------------------------------------------------------------


_BLOCK = 4096
_SHARES = 26
_CLONE_NEWNS = 0x00020000
_HEALTHY = "size=64m,nr_inodes=10000"


@dataclass(frozen=True)
class Disk:
    """A disk of its own that only those see who enter its mount namespace."""

    holder: subprocess.Popen[str]
    """A shell in the namespace, which keeps it."""
    at: Path

    @property
    def seen(self) -> Path:
        """Its content, from outside."""
        return Path(f"/proc/{self.holder.pid}/root{self.at}")

    def resize(self, limits: str) -> None:
        """Give it other limits, as mount's options."""
        _tell(self.holder, f"mount -o remount,{limits} '{self.at}'")

    def enter(self) -> Enter:
        """The hook with which a child enters."""
        return Enter(self.holder.pid)


@dataclass(frozen=True)
class Enter:
    """Moves a process that has no threads into the mount namespace of another."""

    pid: int

    def __call__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        handle = os.open(f"/proc/{self.pid}/ns/mnt", os.O_RDONLY)
        if libc.setns(handle, _CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(handle)


@contextmanager
def disk(at: Path, limits: str) -> Iterator[Disk]:
    """A disk in memory, mounted at a new folder where only Enter leads.

    Raises:
        unittest.SkipTest: this user may not mount here.
    """
    unshare = shutil.which("unshare")
    if unshare is None:
        raise unittest.SkipTest("there is no unshare command; on Debian and Ubuntu: apt install util-linux")
    at.mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen([unshare, "--mount", "sh"], text=True, **pipes) as holder:
        try:
            _tell(holder, f"mount -t tmpfs -o {limits} none '{at}'")
            yield Disk(holder, at)
        finally:
            holder.kill()


def _tell(holder: subprocess.Popen[str], command: str) -> None:
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        holder.stdin.write(f"{command} 2>&1 && echo done || echo failed\n")
        holder.stdin.flush()
    except BrokenPipeError:
        pass  # it says why below
    said = ""
    while not said.endswith(("done\n", "failed\n")):
        line = holder.stdout.readline()
        if not line:
            break
        said += line
    if said != "done\n":
        raise unittest.SkipTest(f"a disk cannot be mounted here (run as root): {said.strip() or 'unshare failed'}")


def fill(numerator: int, what: str, folder: Path) -> None:
    """A run on a disk that holds a part of its product, and again once the disk is large.

    Args:
        numerator: The disk holds so many parts of ``_SHARES`` + 1.
        what: Of which there are too few: bytes or files.
        folder: Where.
    """
    product = kills.uninterrupted(LORA).folder / "out"
    files = list(product.rglob("*"))
    share = numerator / (_SHARES + 1)
    blocks = sum(-(-path.stat().st_size // _BLOCK) for path in files if path.is_file())
    limits = {
        "bytes": f"size={max(1, int(blocks * share)) * _BLOCK},nr_inodes=10000",
        "files": f"size=64m,nr_inodes={2 + int((len(files) - 1) * share)}",  # the disk itself takes one
    }
    with disk(folder / "out", limits[what]) as full:
        child = LORA.start(folder, full.enter())
        check_stopped(LORA, child, folder, full.seen)
        full.resize(_HEALTHY)
        LORA.finish(folder, full.enter(), full.seen.parent)


def _full_disks() -> Sequence[Trial]:
    return [
        Trial(f"a disk with room for {part}/{_SHARES + 1} of the product's {what}", functools.partial(fill, part, what))
        for part in range(1, _SHARES + 1)
        for what in ("bytes", "files")
    ]


CAMPAIGNS = [
    Campaign(
        "ENOSPC, EIO, EDQUOT, EROFS at every system call of a save",
        "Exit code 7 and one message that names the path, whole checkpoints, no half file; the same command ends with"
        " the same bytes.",
        functools.partial(_faults, kills.SAVE),
        least=270,
        sample=0,  # a full disk below, and other_commands at system calls
    ),
    Campaign(
        "ENOSPC, EIO, EDQUOT, EROFS at every system call of a resume",
        "Exit code 7 and one message that names the path, whole checkpoints, no half file; the same command ends with"
        " the same bytes.",
        functools.partial(_faults, kills.RESUME),
        least=88,
        sample=0,
    ),
    Campaign(
        "A full disk",
        "Exit code 7 and one message that names the path, whole checkpoints, no half file; with more room the same"
        " command ends with the same bytes.",
        _full_disks,
        least=30,
        sample=1,
    ),
]
