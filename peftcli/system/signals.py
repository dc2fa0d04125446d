"""Signals: the first asks a command to stop, the second ends it at once; another asks a run for a checkpoint."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from peftcli.errors import Interrupted

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAVING = signal.SIGUSR2
STARTED = float(os.environ.get("PEFTCLI_STARTED") or time.monotonic())
"""When this command began, on the machine's monotonic clock; a process that was launched knows the launcher's."""
TIME_LIMIT = 64
"""Stands where a signal's number does: the time that a run may take is over."""
_SAVE = 1
"""The same: a checkpoint is wanted, and training goes on."""
_ECHO_SECONDS = 0.3
"""A scheduler signals a launcher and its processes, and the launcher passes the signal on: both are one request."""


@dataclass
class Stop:
    """Whether a signal asked to stop, or for a checkpoint."""

    signal: int = 0
    """The signal's number; 0: none came."""
    save: bool = False
    """Whether a checkpoint is wanted."""
    saved: bool = False
    """Whether an earlier attempt left a checkpoint."""
    at_once: bool = True
    """Whether there is nothing to save yet, so that a signal ends the run right away."""
    message: str = "stopped"
    """What is said then."""
    when: float = 0.0
    """When the signal came, on the monotonic clock."""
    deadline: float | None = None
    """Until when a run may go on, on the same clock."""

    @property
    def request(self) -> int:
        """What is asked for, so that of several processes' requests the greatest counts; 0: nothing."""
        late = self.deadline is not None and time.monotonic() > self.deadline
        return self.signal or (TIME_LIMIT if late else _SAVE if self.save else 0)

    def interrupted(self, message: str, *, saved: bool, request: int = 0) -> Interrupted:
        """The error that ends the run: 130 after Ctrl-C; else 75 with a checkpoint, 143 without."""
        number = request or self.signal
        code = 130 if number == signal.SIGINT else 75 if saved else 143
        hint = "run the same command again to go on" if saved else None
        why = "training.max_time" if number == TIME_LIMIT else signal.Signals(number).name
        return Interrupted(f"{message} ({why})", exit_code=code, hint=hint)

    def check(self) -> None:
        """Raises Interrupted if a signal came whose exception somebody else's code has swallowed."""
        if self.signal:
            raise self.interrupted(self.message, saved=self.saved)

    def explains(self, error: BaseException) -> Interrupted | None:
        """The Interrupted that an error stands for: foreign code may turn the one that a signal raises into another."""
        if isinstance(error, Interrupted):
            return error
        return self.interrupted(self.message, saved=self.saved) if self.signal and self.at_once else None

    def note(self, number: int, _frame: FrameType | None = None) -> None:
        """Handles a stopping signal."""
        if self.signal:
            if self.signal == number and time.monotonic() - self.when < _ECHO_SECONDS:
                return
            os._exit(130 if number == signal.SIGINT else 143)
        self.signal, self.when = number, time.monotonic()
        if self.at_once:
            self.check()

    def note_save(self, _number: int, _frame: FrameType | None = None) -> None:
        """Handles the signal that asks for a checkpoint."""
        self.save = True


_current: list[Stop] = []
"""Those of the commands that this process is in, the innermost last."""


def current() -> Stop:
    """What the running command was asked; outside of ``handled``, nothing."""
    return _current[-1] if _current else Stop()


def check() -> None:
    """Raises Interrupted if the running command was asked to stop. To be called between pieces of long work."""
    current().check()


def wants_save(request: int) -> bool:
    """Whether a request is for a checkpoint and no more."""
    return request == _SAVE


@contextmanager
def handled(message: str = "stopped", save_on: signal.Signals | None = SAVING, *, last: bool = False) -> Iterator[Stop]:
    """Inside, INT, TERM and USR1 are noted in the Stop; a second one ends the process.

    Only a main thread can handle signals; elsewhere nothing is caught.

    Args:
        message: What is said when a signal ends the command.
        save_on: The signal that asks for a checkpoint, which does not stop then.
        last: Whether stopping signals are ignored afterwards, in a process that then only says how it ended.
    """
    outer = current()
    outer.check()
    stop = Stop(save=outer.save, saved=outer.saved, message=message)
    handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]] = dict.fromkeys(STOPPING, stop.note)
    if save_on is not None:
        handlers[save_on] = stop.note_save
    try:
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    except ValueError:  # not the main thread
        before = {}
    _current.append(stop)
    try:
        yield stop
    except Exception as error:
        if stop.signal:  # an echo of it may come when this is over
            outer.signal, outer.when, outer.saved, outer.at_once = stop.signal, stop.when, stop.saved, False
        if (interrupted := stop.explains(error)) is None or interrupted is error:
            raise
        raise interrupted from error
    finally:
        _current.pop()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last and number in STOPPING else handler)
