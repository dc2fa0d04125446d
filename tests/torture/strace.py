"""Faults at one system call of a child: it is traced once, then run again with a signal or an error at a chosen call.

A call is found again by its name, its path and its turn among the calls of that name on that path. strace counts only
the calls that its filters let through, so what else Python opens and writes does not matter. ``--seccomp-bpf`` would
be faster and silently injects nothing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
import unittest
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainkit import Child

Start = Callable[[Path, Callable[[], None]], Child]
"""Starts the program in a folder; the hook is called in the child before the program begins."""

_CHANGES = (
    "open,openat,creat,write,pwrite64,writev,sendfile,copy_file_range,truncate,ftruncate,fallocate,fsync,fdatasync,"
    "rename,renameat,renameat2,link,linkat,symlink,symlinkat,mkdir,mkdirat,unlink,unlinkat,rmdir,"
    "chmod,fchmod,fchmodat,utimensat,close"
)
"""System calls that change a folder or make a change last; some file systems tell of a failed write at close."""
_LINE = re.compile(r"\d+ +(\w+)\((.*)")
_PATH = re.compile(r'"(/[^"]*)"|<(/[^>]*)>')


@dataclass(frozen=True)
class Point:
    """A system call that succeeds and changes something, as every run of the program makes it."""

    syscall: str
    path: str
    """Below the program's folder. ``PID`` stands for the number of the process."""
    turn: int
    """Among the calls of that name on that path; the first is 1."""
    name: str
    """For people: the call and what it is about."""


PATIENCE = 600.0
"""Seconds that a run of a second or two may take on a machine that does much else."""


class DidNotHappen(AssertionError):
    """A fault that did not happen, so that the trial shows nothing."""


def require() -> None:
    """Skips the test that asked, where there is no strace.

    Raises:
        unittest.SkipTest: saying how to install it.
    """
    if shutil.which("strace") is None:
        raise unittest.SkipTest("strace is not on PATH; on Debian and Ubuntu: apt install strace")


def points(start: Start, folder: Path) -> list[Point]:
    """The calls that change something below ``folder``, in their order, of a run that nothing disturbs."""
    names = _CHANGES.replace(",", ",?")  # a ?: no error where a machine does not have it
    child, log = _traced(start, folder, ["-y", "-s", "4096", "-e", f"trace=?{names}"])
    assert child.wait() == 0, child.err
    found, turns, written = list[Point](), Counter[tuple[str, str]](), set[str]()
    for line in log.read_text(errors="replace").splitlines():
        call = _LINE.match(line)
        if call is None or str(folder) not in line:
            continue
        arguments, _, result = call[2].rpartition(") = ") if ") = " in call[2] else (call[2], "", "0")
        paths = _own_paths(arguments, folder, child.process.pid)
        if call[1] == "rename":
            paths = paths[:1]  # the only one that strace's filter looks at
        for path in paths:
            turns[call[1], path] += 1
        opened_to_read = call[1] in ("open", "openat") and not re.search("O_CREAT|O_TRUNC", arguments)
        if not paths or opened_to_read or result.startswith("-") or (call[1] == "close" and paths[0] not in written):
            continue
        if "write" in call[1]:
            written.add(paths[0])
        turn = turns[call[1], paths[0]]
        inside = re.search(r'>, "([^"/]+)"', arguments)  # unlinkat names a file of an open folder
        about = f"{paths[0]}/{inside[1]}" if inside else paths[0] + f", time {turn}" * (turn > 1)
        found.append(Point(call[1], paths[0], turn, f"{call[1]} {about}"))
    return found


def inject(start: Start, folder: Path, point: Point, fault: str) -> Child:
    """Runs the program in ``folder`` with a fault at one call, and waits for its end.

    Args:
        start: Starts the program.
        folder: Its folder.
        point: The call.
        fault: What strace calls it: ``signal=SIGKILL``, ``error=ENOSPC``.

    Raises:
        DidNotHappen: the call was not made.
    """

    def chosen(pid: int) -> list[str]:
        path = str(folder / point.path.replace("PID", str(pid)))
        return ["-P", path, "-e", f"trace={point.syscall}", "-e", f"inject={point.syscall}:{fault}:when={point.turn}"]

    child, log = _traced(start, folder, chosen)
    child.wait()
    lines = log.read_text(errors="replace").splitlines()
    happened = any("(INJECTED)" in line for line in lines)
    if fault == "signal=SIGKILL":
        ended = re.compile(rf"{child.process.pid} +\+\+\+ killed by SIGKILL")  # its own children may end after it
        happened = any(map(ended.match, lines))
    if not happened:
        raise DidNotHappen(f"the fault did not happen: {point.name}\n{child.err}")
    return child


def _traced(start: Start, folder: Path, options: list[str] | Callable[[int], list[str]]) -> tuple[Child, Path]:
    """A child under strace, which has ended, and strace's log."""
    beside = Path(tempfile.mkdtemp(dir=folder, prefix="strace-"))
    go, log = beside / "go", beside / "log"
    child = start(folder, Gate(go))
    pid = child.process.pid
    chosen = options(pid) if callable(options) else options
    command = ["strace", "-f", "-o", str(log), *chosen, "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        said = ""
        while "attached" not in said:
            line = tracer.stderr.readline()
            assert line, f"strace cannot trace: {said}"
            said += line
        go.touch()
        try:
            child.wait(PATIENCE)
            tracer.communicate(timeout=30)
        finally:
            tracer.kill()
    return child, log


@dataclass(frozen=True)
class Gate:
    """Keeps a child from beginning until a file appears."""

    go: Path

    def __call__(self) -> None:
        while not self.go.exists():
            time.sleep(0.002)


def _own_paths(arguments: str, folder: Path, pid: int) -> list[str]:
    """The paths below ``folder`` that a call is about, each relative to it."""
    found = dict.fromkeys(quoted or opened for quoted, opened in _PATH.findall(arguments))
    own = [Path(path) for path in found if Path(path).is_relative_to(folder) and Path(path) != folder]
    return [re.sub(rf"(?<!\d){pid}(?!\d)", "PID", str(path.relative_to(folder))) for path in own]
