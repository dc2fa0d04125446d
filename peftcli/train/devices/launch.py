"""One process per device on this machine: their signals, their exit codes, and what happens when one fails.

Each process writes how it ended to a file of its own, ``PEFTCLI_STATUS``/RANK.json, so that the reason is not lost: a
process that ended without such a file died. A stopped process ends the group, and so does a group that is idle. Where
several machines train together, ``machines`` starts their processes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftcli.errors import GateFailed, Interrupted, PeftcliError, ProcessDied, StorageError, UsageError
from peftcli.schema import Launch
from peftcli.system.cores import usable_cores
from peftcli.system.signals import SAVE_SIGNAL, STARTED, STOP_SIGNALS, end_with_parent
from peftcli.train.devices.schedulers import is_pod

_GRACE_SECONDS = 12.0
"""Time for the other processes to end after one has failed."""
_STOPPED_SECONDS = 8.0
"""Time that a process may be stopped, as by SIGSTOP."""
_IDLE_SECONDS = 12.0
"""Time that all processes together may be idle, once they train."""
_IDLE_BEFORE = 180.0
"""The same before, when they may wait for the hub, and on several machines."""
_LOOK_SECONDS = 5.0
"""Longest time between two looks of a launcher that runs."""
_IDLE_SHARE = 0.04
"""Share of one core below which a group is idle. Redrawing a progress bar takes less."""
_REDRAWN_BYTES = 20_000
"""The most that a progress bar writes between two looks, which does not count as work."""
STATUS = "PEFTCLI_STATUS"
"""The variable that names the folder in which each process reports how it ended."""
TRAINING = "training"
"""A file in that folder while processes train, and wait only for one another."""
MEASURING = "measuring"
"""A file there while a process computes metrics, which may wait for a model that judges, as long as that takes."""


def is_launched() -> bool:
    """Whether a launcher (this one, accelerate, torchrun) started this process as one of several."""
    if is_pod():
        return False
    return "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def launched_processes() -> int:
    """Number of processes that the launcher of this one started; 1 without a launcher."""
    count = os.environ.get("WORLD_SIZE", "")
    return int(count) if count.isdigit() else 1


@contextmanager
def leave_group_on_exit() -> Iterator[None]:
    """Leave the process group on exit.

    The threads of a group that still exists when Python ends can abort the process, after all is done. Of a model that
    FSDP2 has divided, torch keeps the group. After an error NCCL would wait for the others, which wait for this one.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        import torch.distributed

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if failed and torch.distributed.get_backend() == "nccl":
                torch.distributed.distributed_c10d._abort_process_group()
            else:
                torch.distributed.destroy_process_group()


def started_by_peftcli() -> bool:
    """Whether ``run_processes`` started this process."""
    return STATUS in os.environ


def is_main_process() -> bool:
    """Whether this is process 0 of a launched group, or alone."""
    return os.environ.get("RANK", "0") == "0"


def process_count(launch: Launch) -> int:
    """Number of processes to start on this machine: as the recipe says, by default one per visible GPU.

    Raises:
        UsageError: there are fewer GPUs.
    """
    import torch

    gpus = torch.cuda.device_count()
    if launch.num_processes == "auto":
        return max(1, gpus)
    if gpus and launch.num_processes > gpus:
        raise UsageError(f"{launch.num_processes} processes for {gpus} GPUs", key="launch.num_processes")
    return launch.num_processes


def total_processes(launch: Launch) -> int:
    """Number of processes of a run, over all machines."""
    asked = launch.num_processes
    return (process_count(launch) if asked == "auto" else asked) * launch.num_machines


def peftcli_command(words: Sequence[str]) -> list[str]:
    """Return the command that runs ``peftcli`` with ``words`` in another process, which imports what this one would.

    ``python -m`` would import modules from the current folder first, and ``-P`` against it needs Python 3.11.
    """
    path = [each for each in sys.path if isinstance(each, str)]  # others are ignored
    run = 'import runpy; runpy.run_module("peftcli", run_name="__main__", alter_sys=True)'
    return [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}; {run}", *words]


def run_processes(
    command: Sequence[str],
    count: int,
    port: int | str,
    lock: tuple[int, dict[str, str]],
    save_on: str | None,
    afterwards: Callable[[], None],
) -> None:
    """Run ``peftcli`` with ``command`` in ``count`` processes that form a group.

    INT, TERM, USR1 and HUP are passed on, so that they stop with a checkpoint, and ``save_on``, so that they write one.
    ``lock`` is the file descriptor that locks the run folder, and the variables that name it to process 0.
    ``afterwards`` is called when all have done their work, before their answer is printed.

    Raises:
        PeftcliError: the error of the first process that failed; of a failed gate, once the answer is printed.
        ProcessDied: a process was killed, crashed, stopped, or ended while the others went on.
        Interrupted: a signal ended them.
    """
    handle, variables_of_lock = lock
    if port == "auto":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    shared = shared_variables(count) | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with tempfile.TemporaryDirectory(prefix="peftcli-") as status, tempfile.TemporaryFile() as answer:
        group = _Group(Path(status), signal.Signals[save_on] if save_on else None)
        with _forwarding(group):
            for number in range(count):
                variables = shared | {STATUS: status, "RANK": str(number), "LOCAL_RANK": str(number)}
                group.processes.append(
                    subprocess.Popen(
                        peftcli_command(command),
                        env=os.environ | variables | (variables_of_lock if number == 0 else {}),
                        stdout=answer if number == 0 else subprocess.DEVNULL,
                        pass_fds=[handle] if number == 0 else [],
                        start_new_session=True,  # Ctrl-C reaches them once, through us
                    )
                )
            error = group.wait()
        answer.seek(0)
        conclude(error, lambda: answer.read().decode(), afterwards)


def conclude(error: PeftcliError | None, answer: Callable[[], str], afterwards: Callable[[], None]) -> None:
    """Print the answer of processes that have done their work. Of a group that died, the answer is the error."""
    if error is not None and error.exit_code != GateFailed.exit_code:
        raise error
    afterwards()
    try:
        sys.stdout.write(answer())
        sys.stdout.flush()
    finally:  # also where nobody reads the answer
        if error is not None:
            raise error


def report_outcome(error: PeftcliError | None) -> int | None:
    """Report to the launcher, which shows the error, how this process ended; return the process's exit code.

    None: there is no launcher that will show the error.

    Raises:
        StorageError: there is one, and success cannot be reported to it.
    """
    folder = os.environ.get(STATUS)
    if folder is None:
        return None
    ended = None if error is None else error_fields(error)
    path = Path(folder) / f"{os.environ['LOCAL_RANK']}.json"
    try:
        path.with_suffix(".tmp").write_text(json.dumps(ended))
        path.with_suffix(".tmp").rename(path)
    except OSError as full:
        if error is None:
            raise StorageError(f"cannot be written: {full.strerror}", file=str(path)) from None
        return None
    if error is None or (error.exit_code == GateFailed.exit_code and "TORCHELASTIC_RUN_ID" in os.environ):
        return 0  # to the agent of several machines, a process that has done its work
    return error.exit_code


def error_fields(error: PeftcliError) -> dict[str, Any]:
    """Return an error as ``ErrorOfProcess`` wants it."""
    return {**error.as_dict(), "exit_code": error.exit_code, "shown": str(error)}


def report(state: str, *, over: bool = False) -> None:
    """Report to the launcher that this process is in a state, TRAINING or MEASURING, or that this is over."""
    if folder := os.environ.get(STATUS):
        with suppress(OSError):
            (Path(folder) / state).unlink(missing_ok=True) if over else (Path(folder) / state).touch()


def follow_parent() -> None:
    """Make this process end when the launcher that started it is killed (Linux)."""
    launcher = os.environ.get("PEFTCLI_LAUNCHED")
    if launcher:
        end_with_parent(int(launcher))


def shared_variables(count: int) -> dict[str, str]:
    """Return the environment that ``count`` processes on this machine share."""
    import torch
    from accelerate.utils import check_cuda_p2p_ib_support

    environment = {"PEFTCLI_LAUNCHED": str(os.getpid()), "PEFTCLI_STARTED": str(STARTED)}
    if "OMP_NUM_THREADS" not in os.environ:
        environment |= {"OMP_NUM_THREADS": str(max(1, usable_cores() // count)), "PEFTCLI_THREADS": "shared"}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    elif not check_cuda_p2p_ib_support():  # several RTX 40: accelerate refuses to start without these
        environment |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    return environment


class ErrorOfProcess(PeftcliError):
    """An error that a process reported, with the text that it shows."""

    def __init__(self, ended: dict[str, Any]):
        super().__init__(ended["message"], file=ended["file"], line=ended["line"], key=ended["key"], hint=ended["hint"])
        self.ended, self.exit_code = ended, ended["exit_code"]

    def __str__(self) -> str:
        return str(self.ended["shown"])

    def as_dict(self) -> dict[str, object]:
        return {name: value for name, value in self.ended.items() if name not in ("exit_code", "shown")}


class Failed(ProcessDied):
    """A process ended by an error that nobody expected."""


@dataclass
class _Group:
    """The processes of a run on this machine."""

    status: Path
    """The folder in which each process reports how it ended."""
    save_on: signal.Signals | None
    """The signal that asks for a checkpoint."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    """Signals to pass on."""
    forwarded: list[int] = field(default_factory=list)
    """Signals that were passed on."""

    def wait(self) -> PeftcliError | None:
        """Wait for all. Returns the error of the first that failed, once the others have ended or been killed."""
        detector = HangDetector()
        ended: dict[int, float] = {}  # process -> when it was seen to have ended, or to be about to, in that order
        error: PeftcliError | None = None
        while any(process.poll() is None for process in self.processes) or len(ended) < len(self.processes):
            training = (self.status / TRAINING).exists()
            self.pass_on(training=training)
            for number, process in enumerate(self.processes):
                # other libraries' hooks may keep one that has reported, as while a tracker's server does not answer
                if process.poll() is not None or (self.status / f"{number}.json").exists():
                    ended.setdefault(number, time.monotonic())
            codes = {number: self.processes[number].returncode for number in ended}
            error = first_error(self.status, codes, len(self.processes), self.forwarded)
            late = bool(ended) and time.monotonic() - next(iter(ended.values())) > _GRACE_SECONDS
            if error is None and len(ended) < len(self.processes):
                living = {number: each.pid for number, each in enumerate(self.processes) if number not in ended}
                reason = detector.find_hang(living, training=training, measuring=(self.status / MEASURING).exists())
                if reason is not None:
                    self.end()
                    return ProcessDied(reason, hint=GO_ON)
            if late:
                break
            time.sleep(0.05)
        if len(ended) < len(self.processes) and error is None:
            number = next(iter(ended))
            error = ProcessDied(f"process {number} of {len(self.processes)} ended before the others", hint=GO_ON)
        self.end()
        return error

    def pass_on(self, *, training: bool) -> None:
        """Pass the received signals on. A request for a checkpoint would kill a process that does not train yet."""
        held = [number for number in self.waiting if number == self.save_on and not training]
        now = [number for number in self.waiting if number not in held]
        self.waiting[: len(held) + len(now)] = held  # others may come meanwhile
        for number in now:
            self.forwarded.append(number)
            for process in self.processes:
                with suppress(ProcessLookupError):
                    process.send_signal(number)

    def end(self) -> None:
        """Kill the processes that are alive."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def first_error(status: Path, codes: Mapping[int, int], count: int, forwarded: Sequence[int]) -> PeftcliError | None:
    """Return why the first process failed that did so by itself; None if none did.

    ``status`` is the folder in which each of ``count`` processes reported how it ended, and ``codes`` has the exit
    codes of those that have ended, in that order.
    """
    errors = [
        error for number, code in codes.items() if (error := _error(status, number, code, count, forwarded)) is not None
    ]

    def followed(error: PeftcliError) -> bool:
        """Whether it reported that another process died, or was stopped although nobody signalled the launcher."""
        reported = isinstance(error, ErrorOfProcess) and error.exit_code == ProcessDied.exit_code
        return reported or (error.exit_code in _STOPPED and not forwarded)

    return min(errors, key=followed, default=None)


def _error(status: Path, number: int, code: int, count: int, forwarded: Sequence[int]) -> PeftcliError | None:
    """Why an ended process failed; None if it did not."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        reported = json.loads((status / f"{number}.json").read_bytes())
        if reported is None:  # its work is done; torch's threads may abort it as Python ends
            return None
        if reported["exit_code"] != PeftcliError.exit_code:
            return ErrorOfProcess(reported)
        return Failed(f"process {number} of {count} failed: {reported['shown']}", hint=GO_ON)
    if -code in forwarded or (code in _AT_ONCE and forwarded):  # it did not listen yet, or had two
        last = signal.Signals(forwarded[-1])
        return Interrupted(f"stopped at once ({last.name})", exit_code=130 if last == signal.SIGINT else 143)
    if 1 < code <= GateFailed.exit_code:  # the disk of the status files may be full
        kind = {each.exit_code: each for each in PeftcliError.__subclasses__()}[code]
        return kind(f"process {number} of {count} ended with {code}; what it printed says why")
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code} before its work was done"
    hint = f"{GO_ON}; if nobody killed it, the memory may not have sufficed" if code == -signal.SIGKILL else GO_ON
    return ProcessDied(f"process {number} of {count} {how}", hint=hint)


GO_ON = "run the same command again to go on"
_AT_ONCE = (130, 143)
_STOPPED = (75, *_AT_ONCE)


@dataclass
class HangDetector:
    """Detects stopped processes and an idle group (Linux)."""

    stopped: dict[int, float] = field(default_factory=dict)
    """Process -> when it was found stopped."""
    busy: float = field(default_factory=time.monotonic)
    """When the group last worked."""
    seen: tuple[float, float, int] = (0.0, 0.0, 0)
    """When the group was last looked at, and its CPU seconds and bytes read and written then."""

    def find_hang(
        self,
        living: dict[int, int],
        *,
        training: bool,
        measuring: bool = False,
        everywhere: Callable[[float], float] | None = None,
    ) -> str | None:
        """What is wrong with the processes (number -> pid); None if nothing is.

        ``everywhere`` is for several machines: it takes for how many seconds the processes here have been idle, and
        returns for how many those of all machines have been.
        """
        now = time.monotonic()
        if sys.platform != "linux" or now - self.seen[0] < 1.0:
            return None
        states = {number: _state_of(pid) for number, pid in living.items()}
        states |= {-pid: _state_of(pid) for each in living.values() for pid in _descendants_of(each)}
        for number in living:
            state = states[number][0]
            if state != "T":
                self.stopped.pop(number, None)
            elif now - self.stopped.setdefault(number, now) > _STOPPED_SECONDS:
                return f"process {number} was stopped from outside (SIGSTOP)"
        computed = sum(seconds for _, seconds, _ in states.values())
        moved = sum(size for _, _, size in states.values())
        waits_for_a_disk = any(state == "D" for state, _, _ in states.values())
        computes = computed - self.seen[1] > _IDLE_SHARE * (now - self.seen[0])
        paused = now - self.seen[0] > _LOOK_SECONDS  # this process too, as by the machine
        if measuring or paused or waits_for_a_disk or computes or moved - self.seen[2] > _REDRAWN_BYTES:
            self.busy = now
        self.seen = now, computed, moved
        idle, limit = now - self.busy, _IDLE_SECONDS if training else _IDLE_BEFORE
        if everywhere is not None:
            idle, limit = everywhere(idle), _IDLE_BEFORE  # a slow network takes little time of a processor
        if idle > limit:
            return f"the processes wait for one another, and none has done anything for {idle:.0f} seconds"
        return None


def _descendants_of(pid: int) -> Iterator[int]:
    """The processes that a process, or one of these, has started, as those that read files for it, or compile."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):  # of each thread
        with suppress(OSError):  # it has ended meanwhile
            for child in map(int, children.read_text().split()):
                yield child
                yield from _descendants_of(child)


def _state_of(pid: int) -> tuple[str, float, int]:
    """A process's state as one letter, its CPU seconds, and the bytes that it has read and written.

    The seconds are also those of the processes that it has started, once they have ended.
    """
    with suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        seconds = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        return fields[0], seconds, int(counts["rchar"]) + int(counts["wchar"])
    return "X", 0.0, 0


@contextmanager
def _forwarding(group: _Group) -> Iterator[None]:
    """Pass signals on to the processes; kill on exit those that are alive."""

    def forward(number: int, _frame: object) -> None:
        group.waiting.append(number)

    before = {number: signal.signal(number, forward) for number in {*STOP_SIGNALS, group.save_on or SAVE_SIGNAL}}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        group.end()
