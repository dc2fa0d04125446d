"""A forked process that does untrusted work within limits of processor time and memory (Linux)."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from peftcli.system.signals import end_with_parent

_IDLE_SECONDS = 10.0
"""Time without work after which the process ends."""


class LimitedProcess:
    """A fork of this process in which ``function`` is called, with limits. It is started when it is needed.

    Arguments and results are pickled. On other systems than Linux, ``function`` is called here, without limits.
    """

    def __init__(self, function: Callable[[Any], Any], memory: int):
        """``memory``: bytes that it may take besides what this process has."""
        self._function, self._memory, self._lock = function, memory, threading.Lock()
        self._owner = self._pid = 0
        self._channel: Connection

    def call(self, argument: Any, seconds: float) -> Any:
        """Return ``function(argument)``.

        Raises:
            TimeoutError: it takes more processor time.
            MemoryError: it takes more memory.
        """
        if sys.platform != "linux":
            return self._function(argument)
        with self._lock:
            for _ in range(2):  # the process may have been idle, or the thread that started it has ended
                if self._owner != os.getpid():
                    self._start()
                try:
                    self._channel.send((seconds, argument))
                    result, fits = self._channel.recv()
                except (EOFError, OSError):
                    if self._end() == signal.SIGPROF:
                        raise TimeoutError from None
                except BaseException:  # a signal: the answer would be taken for the next one's
                    os.kill(self._pid, signal.SIGKILL)
                    self._end()
                    raise
                else:
                    if not fits:
                        raise MemoryError
                    return result
            raise MemoryError

    def _start(self) -> None:
        parent, (self._channel, theirs) = os.getpid(), Pipe()
        others = signal.valid_signals() - {signal.SIGPROF}
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, others)  # in the new process, for ever
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: this process has threads
                self._pid = os.fork()
            if not self._pid:
                self._serve(theirs, parent)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        theirs.close()
        self._owner = parent

    def _end(self) -> int:
        """Wait for the end of the process; return the number of the signal that ended it, or 0."""
        self._owner = 0
        self._channel.close()
        return os.WTERMSIG(os.waitpid(self._pid, 0)[1])

    def _serve(self, channel: Connection, parent: int) -> None:
        """Answer calls until there is none for a while, and end the process."""
        try:
            end_with_parent(parent)
            for entry in list(Path("/proc/self/fd").iterdir()):
                number = int(entry.name)
                if number > 2 and number != channel.fileno():  # such as the lock of a run folder
                    with suppress(OSError):
                        os.close(number)
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            most = pages * resource.getpagesize() + self._memory
            resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))
            while channel.poll(_IDLE_SECONDS):
                seconds, argument = channel.recv()
                signal.setitimer(signal.ITIMER_PROF, seconds)
                try:
                    answer = self._function(argument), True
                except MemoryError:
                    answer = None, False
                signal.setitimer(signal.ITIMER_PROF, 0)
                channel.send(answer)
        finally:
            os._exit(0)
