"""One process per device on this machine, their signals and their exit codes."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from peftcli.errors import Interrupted, ProcessDied, UsageError
from peftcli.schema import Launch

_GRACE_SECONDS = 20.0
"""How long the other processes may take to end after one has died."""
_OURS = {2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 75, 130, 143}
"""Exit codes that say what went wrong; any other means that the process died."""
_PR_SET_PDEATHSIG = 1


def launched() -> bool:
    """Whether a launcher (this one, accelerate, torchrun) started this process as one of several."""
    return "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


@contextmanager
def left_in_the_end() -> Iterator[None]:
    """Afterwards this process has left the group of the others.

    The threads of a group that still stands when Python ends can abort the process, after all is done.
    """
    try:
        yield
    finally:
        import torch.distributed

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def is_main_process() -> bool:
    """Whether this is process 0 of a launched group, or alone."""
    return os.environ.get("RANK", "0") == "0"


def process_count(launch: Launch) -> int:
    """Processes to start on this machine: as the recipe says, by default one per visible GPU.

    Raises:
        UsageError: more than there are GPUs.
    """
    import torch

    gpus = torch.cuda.device_count()
    if launch.num_processes == "auto":
        return max(1, gpus)
    if gpus and launch.num_processes > gpus:
        raise UsageError(f"{launch.num_processes} processes for {gpus} GPUs", key="launch.num_processes")
    return launch.num_processes


def total_processes(launch: Launch) -> int:
    """Processes of a run, over all machines. A number that the recipe names may be more than this machine holds."""
    asked = launch.num_processes
    return (process_count(launch) if asked == "auto" else asked) * launch.num_machines


def run_processes(command: Sequence[str], count: int, launch: Launch) -> int:
    """Run ``python -m peftcli`` with ``command`` in ``count`` processes that know of one another.

    The first INT, TERM or USR1 is passed on, so that they stop with a checkpoint.

    Returns:
        The exit code that says why the run ended: the first failing process's, else 0.

    Raises:
        ProcessDied: a process was killed, crashed, or ended while the others went on.
        Interrupted: a signal came before the processes could listen to it.
    """
    port = _free_port() if launch.main_process_port == "auto" else launch.main_process_port
    environments = [os.environ | _environment(launch, number, count, port) for number in range(count)]
    processes: list[subprocess.Popen[bytes]] = []
    with _forwarding(processes) as forwarded, tempfile.TemporaryFile() as answer:
        for number, environment in enumerate(environments):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "peftcli", *command],
                    env=environment,
                    stdout=answer if number == 0 else subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C reaches them once, through us
                )
            )
        code = _wait(processes, forwarded)
        answer.seek(0)
        sys.stdout.write(answer.read().decode())  # only now: of a group that died, the answer is the error
        return code


def follow_parent() -> None:
    """Let this process end when the launcher that started it is killed (Linux)."""
    launcher = os.environ.get("PEFTCLI_LAUNCHED")
    if launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(launcher):  # killed before this call
            os.kill(os.getpid(), signal.SIGKILL)


def _environment(launch: Launch, number: int, count: int, port: int) -> dict[str, str]:
    import torch

    environment = {
        "RANK": str(launch.machine_rank * count + number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(launch.num_machines * count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": launch.main_process_ip,
        "MASTER_PORT": str(port),
        "PEFTCLI_LAUNCHED": str(os.getpid()),
    }
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    return environment


def _wait(processes: list[subprocess.Popen[bytes]], forwarded: list[int]) -> int:
    """Wait for all; once one fails, give the others a while and end them."""
    failed: dict[int, int] = {}  # process -> exit code, in the order in which they failed
    deadline = math.inf
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        _note_failures(processes, failed)
        if failed and deadline == math.inf:
            deadline = time.monotonic() + _GRACE_SECONDS
        time.sleep(0.05)
    _note_failures(processes, failed)
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
    if not failed:
        return 0
    # a process that ended because another had is not the reason
    number = min(failed, key=lambda number: failed[number] == ProcessDied.exit_code)
    code = failed[number]
    if code in _OURS:
        return code
    if -code in forwarded:  # it had not begun to listen to signals
        raise Interrupted(f"stopped before the first step ({signal.Signals(-code).name})", exit_code=128 - code)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    raise ProcessDied(f"process {number} of {len(processes)} {how}", hint="run the same command again to go on")


def _note_failures(processes: list[subprocess.Popen[bytes]], failed: dict[int, int]) -> None:
    for number, process in enumerate(processes):
        if process.returncode:
            failed.setdefault(number, process.returncode)


@contextmanager
def _forwarding(processes: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Inside, signals are passed on to the processes; gives the list of those that were."""
    forwarded: list[int] = []

    def forward(number: int, _frame: object) -> None:
        forwarded.append(number)
        for process in processes:
            with suppress(ProcessLookupError):
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield forwarded
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            if process.poll() is None:
                process.kill()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
