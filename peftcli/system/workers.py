"""Worker processes that compute ahead of their caller, in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from peftcli.errors import PeftcliError, ProcessDied, to_peftcli_error
from peftcli.system.cores import usable_cores
from peftcli.system.signals import SAVE_SIGNAL, STOP_SIGNALS, end_with_parent

T = TypeVar("T")
R = TypeVar("R")

_MOST = 8
_GONE = (EOFError, ConnectionError)


def spare_cores(num_processes: int) -> int:
    """Return the cores, at most eight, that this process can keep busy besides; 0 where processes cannot be forked.

    ``num_processes`` on this machine share its cores.
    """
    if sys.platform != "linux":
        return 0
    return max(0, min(_MOST, usable_cores() // num_processes - 1))


def compute_ahead(function: Callable[[T], R], items: Iterable[T], num_workers: int) -> Generator[R]:
    """Yield ``function(item)`` of each item, in order; each worker is one item ahead.

    Workers are forks of this process that take turns. They leave signals to it, and end when the iterator is closed or
    this process dies. Items and results are pickled.

    Args:
        function: Must not depend on which process calls it, nor on what it was called with before.
        items: Its arguments.
        num_workers: 0: this process computes each item when it is wanted.

    Raises:
        PeftcliError: ``function`` raised it.
        ProcessDied: a worker was killed.
    """
    if not num_workers:
        yield from map(function, items)
        return
    rest, workers = iter(items), list[tuple[Any, Connection]]()
    try:
        for item in islice(rest, num_workers):
            workers.append(_start(function, [channel for _, channel in workers]))
            with suppress(*_GONE):  # receiving its result raises again
                workers[-1][1].send(item)
        waiting = list(workers)
        while waiting:
            process, channel = waiting.pop(0)
            following = list(islice(rest, 1))
            try:
                result, error = channel.recv()
                for item in following:
                    channel.send(item)
                    waiting.append((process, channel))
            except _GONE:
                process.join()
                code = process.exitcode
                cause = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
                hint = "It may have run out of memory; training.dataloader_num_workers says how many there are."
                raise ProcessDied(f"a worker process ended ({cause})", hint=hint) from None
            if error is not None:
                raise error if isinstance(error, PeftcliError) else RuntimeError(error)
            yield result
    finally:
        for process, channel in workers:
            channel.close()
            process.kill()
            process.join()


def _start(function: Callable[[Any], Any], before: Sequence[Connection]) -> tuple[Any, Connection]:
    """Start a worker. Returns its process and the channel to it."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(function, theirs, [*before, ours], os.getpid()), daemon=True)
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP_SIGNALS, SAVE_SIGNAL})  # in the worker, for ever
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: this process has threads
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    theirs.close()
    return process, ours


def _work(function: Callable[[Any], Any], channel: Connection, inherited: Sequence[Connection], parent: int) -> None:
    """Answer items until the channel is closed."""
    end_with_parent(parent)
    for each in inherited:  # else the channel would never be seen to close
        each.close()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    try:
        while True:
            item = channel.recv()
            try:
                answer: tuple[Any, Any] = function(item), None
            except Exception as error:
                answer = None, to_peftcli_error(error) or traceback.format_exc()
            channel.send(answer)
    except _GONE:
        return
