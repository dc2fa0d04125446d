"""The processes of one of several machines, which torch's elastic agent starts.

The agents meet at machine 0's address (torch's c10d rendezvous). When a process or a machine is lost, each ends the
others on its machine, waits until all machines are there again, and starts its processes anew, up to
``launch.max_restarts`` times; they go on at the newest checkpoint. A run that ends for another reason is not started
again: a second attempt would end so, too.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousInfo
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from peftcli.errors import Interrupted, PeftcliError, ProcessDied, UsageError
from peftcli.schema import Launch
from peftcli.system.signals import SAVE_SIGNAL, STOP_SIGNALS
from peftcli.train.launch import GO_ON, STATUS, TRAINING, Watch, conclude, first_error, shared_variables

_NAME = "peftcli"
_JOIN_SECONDS = 600
"""How long a machine waits for the others."""
_OF_THE_AGENT = (signal.SIGHUP, signal.SIGQUIT)
"""Signals that the agent handles, too, and that end this process as they end any."""


def run_on_machine(
    command: Sequence[str],
    count: int,
    launch: Launch,
    save_on: str | None,
    afterwards: Callable[[], None],
    warn: Callable[[str], None],
) -> None:
    """Run ``python -m peftcli`` with ``command`` in ``count`` processes here, and as many on each other machine.

    INT, TERM and USR1 are passed on, so that all stop with a checkpoint, and ``save_on``, so that they write one.

    Args:
        command: The words after ``peftcli``.
        count: How many processes.
        launch: Which machine this is, and where the others are.
        save_on: Name of the signal that asks for a checkpoint.
        afterwards: Is called when all have done their work, before their answer is printed.
        warn: Receives a line for each restart.

    Raises:
        PeftcliError: the error of the first process that failed; of a failed gate, once the answer is printed.
        ProcessDied: processes were lost more often than they may be started again, or the machines did not meet.
        UsageError: two machines have the same number.
        Interrupted: a signal ended them.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what failed is said once, below
    with tempfile.TemporaryDirectory(prefix="peftcli-") as folder, _environment(launch, count, folder):
        agent = _Agent(_spec(command, count, launch), Path(folder), signal.Signals[save_on] if save_on else None, warn)
        with agent.signals_passed_on():
            error = agent.train()
        conclude(error, agent.answer, afterwards)


def _spec(command: Sequence[str], count: int, launch: Launch) -> WorkerSpec:
    name = f"[{launch.main_process_ip}]" if ":" in launch.main_process_ip else launch.main_process_ip
    endpoint = f"{name}:{launch.main_process_port}"
    here = _address(launch)
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=endpoint,
        run_id=_NAME,
        min_nodes=launch.num_machines,
        max_nodes=launch.num_machines,
        local_addr=here,
        is_host=launch.machine_rank == 0,
        read_timeout=_JOIN_SECONDS,
        join_timeout=_JOIN_SECONDS,
    )
    try:
        meeting = get_rendezvous_handler(parameters)
    except RendezvousError:
        whose = "cannot be opened here" if launch.machine_rank == 0 else "does not answer"
        hint = "launch.main_process_ip is an address of machine 0, and the port a free one, the same in each command"
        raise ProcessDied(f"{endpoint}, where the machines meet, {whose}", hint=hint) from None
    return WorkerSpec(
        role=_NAME,
        local_world_size=count,
        rdzv_handler=_Numbered(meeting, launch.machine_rank),  # type: ignore[arg-type]
        entrypoint=sys.executable,
        args=("-m", "peftcli", *command),
        max_restarts=launch.max_restarts,
        local_addr=here,
    )


def _address(launch: Launch) -> str:
    """The address of this machine at which the others reach it. A machine's name may have another one."""
    place, end = (launch.main_process_ip, int(launch.main_process_port)), time.monotonic() + _JOIN_SECONDS
    while True:
        try:
            kind, *_, target = socket.getaddrinfo(*place, type=socket.SOCK_DGRAM)[0]
            with socket.socket(kind, socket.SOCK_DGRAM) as way:
                way.connect(target)  # sends nothing
                return str(way.getsockname()[0])
        except OSError as error:
            if time.monotonic() > end:
                message = f"{place[0]} cannot be reached: {error.strerror or error}"
                raise UsageError(message, key="launch.main_process_ip") from None
        time.sleep(1.0)  # a pod has a name only once it runs


@contextmanager
def _environment(launch: Launch, count: int, folder: str) -> Iterator[None]:
    """The environment of the processes, as that of this one while it starts them."""
    variables = shared_variables(count) | {STATUS: folder}
    # or else a machine that comes back waits for what the others said once, at the first start (torch 2.13)
    variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    here = _address(launch)
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == here for each in addresses):  # or else gloo takes that of the machine's name
            variables["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", name)
    with mock.patch.dict(os.environ, variables):
        yield


class _Numbered:
    """A rendezvous in which each machine has the number that its recipe gives it."""

    def __init__(self, meeting: Any, number: int):
        self.meeting, self.number = meeting, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self.meeting, name)

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the other machines.

        Raises:
            UsageError: two of them have one number.
        """
        found = self.meeting.next_rendezvous()
        store, count = found.store, found.world_size
        store.add(f"machine {self.number}", 1)
        if store.add("machines", 1) == count:
            store.set("all are here", "")
        store.wait(["all are here"], timedelta(seconds=_JOIN_SECONDS))
        if any(store.add(f"machine {each}", 0) != 1 for each in range(count)):
            raise UsageError(f"not every machine has a number of its own below {count}", key="launch.machine_rank")
        return RendezvousInfo(found.store, self.number, found.world_size, found.bootstrap_store_info)


class _Agent(LocalElasticAgent):
    """An agent that starts processes again only where that can help, and passes signals on."""

    def __init__(self, spec: WorkerSpec, folder: Path, save_on: signal.Signals | None, warn: Callable[[str], None]):
        super().__init__(spec, DefaultLogsSpecs(log_dir=str(folder), redirects=Std.OUT), exit_barrier_timeout=60)
        self.spec, self.status, self.save_on, self.warn = spec, folder, save_on, warn
        self.restarts = 0
        self.waiting: list[int] = []
        """Signals to pass on."""
        self.forwarded: list[int] = []
        self.watch = Watch()
        self.error: PeftcliError | None = None
        """Why the processes ended, the last time that they did."""

    def train(self) -> PeftcliError | None:
        """Run the processes until they have ended for good. Returns the error of the first that failed."""
        try:
            self.run()
        except PeftcliError as error:
            return error
        except RendezvousError:
            self.check_signals()
            return self.error or ProcessDied("the other machines have ended, or did not come", hint=GO_ON)
        finally:
            with suppress(Exception):
                self.spec.rdzv_handler.shutdown()  # the others, which wait for this one, end too
        return self.error

    def answer(self) -> str:
        """Return what the first process here has printed; only that of all processes prints anything."""
        return Path(self._pcontext.stdouts[0]).read_text()  # type: ignore[union-attr]

    @contextmanager
    def signals_passed_on(self) -> Iterator[None]:
        """Pass signals on to the processes. The agent itself would end them 30 seconds after the first."""
        before = {number: signal.getsignal(number) for number in (*self._passed_on, *_OF_THE_AGENT)}
        self._listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def _passed_on(self) -> set[signal.Signals]:
        return {*STOP_SIGNALS, self.save_on or SAVE_SIGNAL}

    def _listen(self) -> None:
        for number in self._passed_on:
            signal.signal(number, self._on_signal)
        for number in _OF_THE_AGENT:
            signal.signal(number, signal.SIG_DFL)

    def _on_signal(self, number: int, _frame: object) -> None:
        self.waiting.append(number)
        if not self._pids():
            self.check_signals()

    def check_signals(self) -> None:
        """Raise Interrupted if there is a signal to stop and no process that it could be passed on to."""
        for number in self.waiting:
            if number in STOP_SIGNALS and number != self.save_on:
                code = 130 if number == signal.SIGINT else 143
                name = signal.Signals(number).name
                raise Interrupted(f"stopped while waiting for the other machines ({name})", exit_code=code)

    def _pids(self) -> dict[int, int]:
        """The processes that run."""
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        return {rank: handler.proc.pid for rank, handler in handlers.items() if handler.proc.poll() is None}

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        for left in self.status.glob("*.json"):  # of those that were lost
            left.unlink()
        (self.status / TRAINING).unlink(missing_ok=True)
        self.error = None
        started: dict[int, Any] = super()._start_workers(worker_group)
        self._listen()  # the agent has just put its own handlers in their place
        return started

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        pids, training = self._pids(), (self.status / TRAINING).exists()
        for number in [each for each in self.waiting if training or each != self.save_on]:
            self.waiting.remove(number)
            self.forwarded.append(number)
            for pid in pids.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        if reason := self.watch.look(pids, training=training, alone=False):
            raise ProcessDied(reason, hint=GO_ON)
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            handlers = getattr(self._pcontext, "subprocess_handlers", {})
            failed = {failure.local_rank: failure.exitcode for failure in result.failures.values()}
            codes = failed or {rank: handler.proc.returncode for rank, handler in handlers.items()}
            self.error = first_error(self.status, codes, len(handlers), self.forwarded)
        elif result.state == WorkerState.SUCCEEDED:
            self.error = None
        return result

    def _restart_workers(self, worker_group: Any) -> None:
        if self.error is None:
            self.warn("another machine is new here, or has lost a process; all go on at the newest checkpoint")
        elif self.error.exit_code != ProcessDied.exit_code:
            raise self.error
        else:
            self.restarts += 1
            again = f"restart {self.restarts} of {self.spec.max_restarts}"
            self.warn(f"{self.error.message}; {again}; all go on at the newest checkpoint")
        super()._restart_workers(worker_group)
