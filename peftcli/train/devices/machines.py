"""Start the processes of a run, on one machine or, as one of several, under torch's elastic agent.

The agents meet at machine 0's address (torch's c10d rendezvous). When a process or a machine is lost, each ends the
others on its machine, waits until all machines are there again, and starts its processes anew, up to
``launch.max_restarts`` times; they go on at the newest checkpoint. A run that ends for another reason is not started
again, since it would end so again, and the other machines are told the reason.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, TimeoutError
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any, cast

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousInfo, RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from peftcli.errors import FolderBusy, Interrupted, PeftcliError, ProcessDied, UsageError
from peftcli.schema import Launch, Recipe
from peftcli.system.addresses import local_address_towards, notice_lost_machines, use_interface
from peftcli.system.signals import SAVE_SIGNAL, STOP_SIGNALS
from peftcli.train import fresh_process
from peftcli.train.data import prepare_data
from peftcli.train.devices.launch import (
    GO_ON,
    MEASURING,
    STATUS,
    TRAINING,
    ErrorOfProcess,
    Failed,
    HangDetector,
    conclude,
    error_fields,
    first_error,
    peftcli_command,
    run_processes,
    shared_variables,
)
from peftcli.train.events import Message, OnEvent, warning
from peftcli.train.runs.folder import RunFolder
from peftcli.train.runs.status import read_records, record_failure

_NAME = "peftcli"
_JOIN_SECONDS = 1800
"""How long a machine waits for the others."""
_HEAR_SECONDS = 5.0
"""How long it waits for the reason why another one's processes ended."""
_AGENTS_OWN = (signal.SIGHUP, signal.SIGQUIT)
"""Signals that the agent handles, too, if it is let."""
_LOOPBACK = "127."
"""Where ``/etc/hosts`` often says that a machine's own name is."""


def start_processes(
    recipe: Recipe, folder: RunFolder, command: Sequence[str], count: int, overwrite: bool, tell: OnEvent
) -> None:
    """Lock the run folder, encode the data once, and start ``count`` processes."""
    several, save_on = recipe.launch.num_machines > 1, recipe.training.save_on_signal
    record, is_first = folder.read(), recipe.launch.machine_rank == 0
    if is_first:  # other machines may share the folder
        folder.lock()
    before = read_records(folder)

    def prepare() -> None:
        if overwrite or record is None or record.status != "complete":
            prepare_data(recipe, record.day if record else None, tell)
        if several:
            folder.close()  # process 0 locks it, as often as it is started

    def verify() -> None:
        if several and is_first:
            folder.lock()
        if recipe.training.verify and is_first:
            fresh_process.verify_run(folder.path, tell)

    try:
        if several:
            run_on_machine(
                command,
                count,
                recipe.launch,
                save_on,
                before=prepare,
                afterwards=verify,
                resumable=lambda: (now := folder.read()) is not None and now.resumable,
                tell=tell,
            )
        else:
            prepare()
            port, lock = recipe.launch.main_process_port, folder.give_lock()
            run_processes(command, count, port, lock, save_on, verify)
    except PeftcliError as error:
        if is_first and not isinstance(error, FolderBusy):  # or else it is another run's
            record_failure(folder, error, before)
        raise
    finally:
        folder.close()


def run_on_machine(
    command: Sequence[str],
    count: int,
    launch: Launch,
    save_on: str | None,
    *,
    before: Callable[[], None],
    afterwards: Callable[[], None],
    resumable: Callable[[], bool],
    tell: OnEvent,
) -> None:
    """Run ``peftcli`` with ``command`` in ``count`` processes here, and as many on each other machine.

    INT, TERM and USR1 are passed on, so that all stop with a checkpoint, and ``save_on``, so that they write one.
    ``before`` is called once the others can come, and ``afterwards`` when all have done their work, before their answer
    is printed. ``resumable`` tells whether there is a checkpoint.

    Raises:
        PeftcliError: the error of the first process that failed; of a failed gate, once the answer is printed.
        ProcessDied: processes were lost more often than they may be started again, or the machines did not meet.
        UsageError: two machines have the same number.
        Interrupted: a signal ended them.
    """
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what failed is said once, below
    where, minutes = launch.main_process_ip, _JOIN_SECONDS // 60
    tell(Message(f"waiting for {launch.num_machines} machines at {where}, at most {minutes} minutes"))
    address = _own_address(launch)
    rendezvous = NumberedRendezvous(_rendezvous(launch, address), launch.machine_rank, address)
    before()
    program, *words = peftcli_command(command)
    with tempfile.TemporaryDirectory(prefix="peftcli-") as folder:
        spec = WorkerSpec(
            role=_NAME,
            local_world_size=count,
            rdzv_handler=cast(RendezvousHandler, rendezvous),
            entrypoint=program,
            args=tuple(words),
            max_restarts=launch.max_restarts,
            local_addr=address,
        )
        save = signal.Signals[save_on] if save_on else None
        agent = Agent(spec, rendezvous, Path(folder), save, resumable, tell)
        with _environment(count, folder, address), agent.signals_passed_on():
            error = agent.train()
        conclude(error, agent.answer, afterwards)


def _rendezvous(launch: Launch, address: str) -> Any:
    name = f"[{launch.main_process_ip}]" if ":" in launch.main_process_ip else launch.main_process_ip
    endpoint = f"{name}:{launch.main_process_port}"
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=endpoint,
        run_id=_NAME,
        min_nodes=launch.num_machines,
        max_nodes=launch.num_machines,
        local_addr=address,
        is_host=launch.machine_rank == 0,
        read_timeout=_JOIN_SECONDS,
        join_timeout=_JOIN_SECONDS,
    )
    found = Future[Any]()

    def connect() -> None:
        try:
            found.set_result(get_rendezvous_handler(parameters))
        except Exception as error:
            found.set_exception(error)

    Thread(target=connect, daemon=True).start()  # torch hears no signal while it waits, and may wait without end
    try:
        return found.result(_JOIN_SECONDS)
    except (RendezvousError, TimeoutError):
        whose = "cannot be opened here" if launch.machine_rank == 0 else "does not answer"
        hint = "launch.main_process_ip is an address of machine 0, and the port a free one, the same in each command"
        raise ProcessDied(f"{endpoint}, where the machines meet, {whose}", hint=hint) from None


def _own_address(launch: Launch) -> str:
    """The address at which the others reach this machine. A machine's own name often leads to itself alone."""
    meets, end = (launch.main_process_ip, int(launch.main_process_port)), time.monotonic() + _JOIN_SECONDS
    while True:
        try:
            kind, *_, target = socket.getaddrinfo(*meets, type=socket.SOCK_DGRAM)[0]
            found = local_address_towards(kind, target)
            break
        except OSError as error:
            if time.monotonic() > end:
                message = f"{meets[0]} cannot be reached: {error.strerror or error}"
                raise UsageError(message, key="launch.main_process_ip") from None
        time.sleep(1.0)  # a pod has a name only once it runs
    if not found.startswith(_LOOPBACK) or meets[0].startswith(_LOOPBACK) or meets[0] == "localhost":
        return found
    try:
        # an address that nobody has: by the way to other networks
        return local_address_towards(socket.AF_INET, ("192.0.2.1", 9))
    except OSError:
        message = f"{meets[0]} is an address of this machine that others do not reach ({found})"
        raise UsageError(message, key="launch.main_process_ip", hint="give the address, and not the name") from None


@contextmanager
def _environment(count: int, folder: str, address: str) -> Iterator[None]:
    """The environment of the processes, as that of this one while it starts them."""
    variables = shared_variables(count) | {STATUS: folder, "TORCHELASTIC_SIGNALS_TO_HANDLE": ""}
    # or else a machine that comes back waits for what the others said once, at the first start (torch 2.13)
    variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    outside = {name: os.environ.get(name) for name in (*variables, "GLOO_SOCKET_IFNAME")}
    os.environ.update(variables)
    use_interface(address)
    try:
        yield
    finally:
        for name, value in outside.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class NumberedRendezvous:
    """A rendezvous in which each machine has the number that its recipe gives it."""

    def __init__(self, inner: Any, number: int, address: str):
        self.inner, self.number, self.address = inner, number, address
        self.store: Store | None = None
        """What all that have met read and write."""
        self.others = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the other machines.

        Raises:
            UsageError: two of them have one number.
            RendezvousError: they do not come.
        """
        found = self.inner.next_rendezvous()
        store, count = found.store, found.world_size
        store.add(f"machine {self.number}", 1)
        store.add("machines", 1)
        if not _wait_for_count(store, "machines", count, _JOIN_SECONDS):
            raise RendezvousError("they were there, and are not any more")
        if any(store.add(f"machine {each}", 0) != 1 for each in range(count)):
            store.add("refused", 1)
            with suppress(RuntimeError):  # of a store that is gone; all shall have seen it before
                _wait_for_count(store, "refused", count, 2 * _HEAR_SECONDS)
            raise UsageError(f"not every machine has a number of its own below {count}", key="launch.machine_rank")
        self.store, self.others = store, count - 1
        notice_lost_machines(unanswered=True)
        # process 0 is here where the number is 0, whichever address sorts first
        place = RendezvousStoreInfo.build(self.number, PrefixStore("place", store), local_addr=self.address)
        return RendezvousInfo(store, self.number, count, place)

    def idle_everywhere(self, seconds: float) -> float:
        """Tell the others for how long the processes here have been idle; return for how long those of all have."""
        assert self.store is not None
        self.store.set(f"idle {self.number}", str(seconds))
        names = [f"idle {each}" for each in range(self.others + 1)]
        return min(map(float, self.store.multi_get(names))) if self.store.check(names) else 0.0

    def announce_end(self, error: PeftcliError) -> None:
        """Tell the other machines why this one ends. Where they meet, this one waits until they have heard it."""
        if self.store is None:
            return
        with suppress(RuntimeError):
            self.store.set("ended", json.dumps(error_fields(error)))
            if self.number == 0:
                _wait_for_count(self.store, "heard", self.others, 2 * _HEAR_SECONDS)

    def wait_for_end(self, seconds: float) -> PeftcliError | None:
        """Return why another machine has ended, if one says so in time."""
        if self.store is None:
            return None
        end = time.monotonic() + seconds
        with suppress(RuntimeError):
            while not self.store.check(["ended"]):
                if time.monotonic() > end:
                    return None
                time.sleep(0.05)
            self.store.add("heard", 1)
            return ErrorOfProcess(json.loads(self.store.get("ended")))
        return None


def _wait_for_count(store: Store, name: str, count: int, seconds: float) -> bool:
    """Wait until ``count`` machines have added 1 to a number in the store. Returns whether they did in time."""
    end = time.monotonic() + seconds
    while store.add(name, 0) < count:
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


class Agent(LocalElasticAgent):
    """An agent that starts processes again only where that can help, and passes signals on."""

    def __init__(
        self,
        spec: WorkerSpec,
        rendezvous: NumberedRendezvous,
        folder: Path,
        save_on: signal.Signals | None,
        resumable: Callable[[], bool],
        tell: OnEvent,
    ):
        super().__init__(spec, DefaultLogsSpecs(log_dir=str(folder), redirects=Std.OUT), exit_barrier_timeout=60)
        self.spec, self.rendezvous, self.status, self.save_on = spec, rendezvous, folder, save_on
        self.resumable, self.tell = resumable, tell
        self.waiting: list[int] = []
        """Signals to pass on."""
        self.forwarded: list[int] = []
        self.detector = HangDetector()
        self.error: PeftcliError | None = None
        """Why the processes ended, the last time that they did."""

    def train(self) -> PeftcliError | None:
        """Run the processes until they have ended for good. Returns the error of the first that failed."""
        try:
            self.run()
            if self._pcontext is None:
                self.error = ProcessDied("the run has ended without this machine")
        except PeftcliError as error:
            self.error = error
        except (RendezvousError, RuntimeError):  # the latter of the store, which is gone
            gone = ProcessDied("the other machines have ended, or did not come", hint=GO_ON)
            self.error = self.rendezvous.wait_for_end(0) or self.error or gone
        if self.error is not None:
            self.rendezvous.announce_end(self.error)
        with suppress(Exception):
            self.rendezvous.shutdown()  # others, which wait for this one, end too
        return self.error

    def answer(self) -> str:
        """Return what the first process here has printed; only that of all processes prints anything."""
        assert self._pcontext is not None
        return Path(self._pcontext.stdouts[0]).read_text()

    @contextmanager
    def signals_passed_on(self) -> Iterator[None]:
        """Pass signals on to the processes. The agent itself would end them 30 seconds after the first."""
        self.outside = {number: signal.getsignal(number) for number in {*self._ours, *_AGENTS_OWN}}
        self._listen()
        try:
            yield
        finally:
            for number, handler in self.outside.items():
                signal.signal(number, handler)

    @property
    def _ours(self) -> set[signal.Signals]:
        """Signals that are passed on."""
        return {*STOP_SIGNALS, self.save_on or SAVE_SIGNAL}

    def _listen(self) -> None:
        for number, handler in self.outside.items():
            signal.signal(number, self._on_signal if number in self._ours else handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        self.waiting.append(number)
        if not self._pids():
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """Raise Interrupted if a signal to stop has come, and no process is there that it could be passed on to."""
        for number in (*self.forwarded, *self.waiting):
            if number in STOP_SIGNALS and number != self.save_on:
                saved = self.resumable()
                code = 130 if number == signal.SIGINT else 75 if saved else 143
                message = f"stopped while waiting for the other machines ({signal.Signals(number).name})"
                raise Interrupted(message, exit_code=code, hint=GO_ON if saved else None)

    def _pids(self) -> dict[int, int]:
        """The processes that run."""
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        return {rank: handler.proc.pid for rank, handler in handlers.items() if handler.proc.poll() is None}

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        for left in self.status.glob("*.json"):  # of those that were lost
            left.unlink()
        for name in (TRAINING, MEASURING):
            (self.status / name).unlink(missing_ok=True)
        self.error = None
        self.tell(Message(f"{self.rendezvous.others + 1} machines are there; starting the processes"))
        started: dict[int, Any] = super()._start_workers(worker_group)
        self._listen()  # before torch 2.13 the agent has just put its own handlers there
        return started

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        pids, training = self._pids(), (self.status / TRAINING).exists()
        for number in [each for each in self.waiting if training or each != self.save_on]:
            self.waiting.remove(number)
            self.forwarded.append(number)
            for pid in pids.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        measuring, everywhere = (self.status / MEASURING).exists(), self.rendezvous.idle_everywhere
        if reason := self.detector.find_hang(pids, training=training, measuring=measuring, everywhere=everywhere):
            raise ProcessDied(reason, hint=GO_ON)
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.SUCCEEDED):  # of the latter a gate may have failed
            failed = {each.local_rank: each.exitcode for each in result.failures.values()}
            count = self.spec.local_world_size
            self.error = first_error(self.status, failed or dict.fromkeys(range(count), 0), count, self.forwarded)
            done = first_error(self.status, dict.fromkeys(range(count), -signal.SIGABRT), count, []) is None
            if done and result.is_failed():  # torch's threads have aborted a process as Python ended
                values = {worker.global_rank: None for worker in worker_group.workers}
                return RunResult(state=WorkerState.SUCCEEDED, return_values=values)
        return result

    def _restart_workers(self, worker_group: Any) -> None:
        lost = self.error is None or self.error.exit_code == ProcessDied.exit_code
        if self.error is not None and (not lost or isinstance(self.error, Failed)):
            raise self.error
        self._stop_if_asked()
        if self.error is None:
            self.tell(warning("another machine is new here, or has lost a process; all go on at the newest checkpoint"))
        elif (other := self.rendezvous.wait_for_end(_HEAR_SECONDS)) is not None:
            raise other
        else:
            again = f"restart {self.spec.max_restarts - self._remaining_restarts} of {self.spec.max_restarts}"
            self.tell(warning(f"{self.error.message}; {again}; all go on at the newest checkpoint"))
        super()._restart_workers(worker_group)
