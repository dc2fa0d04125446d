"""Signals: the first stops a command cleanly, a second but SIGHUP ends it at once; another requests a checkpoint."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from peftcli.errors import Interrupted

STOP_SIGNALS = tuple(
    number
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN  # as under nohup
)
SAVE_SIGNAL = signal.SIGUSR2
STARTED = float(os.environ.get("PEFTCLI_STARTED") or time.monotonic())
"""Start of this command on the monotonic clock; a launched process has the launcher's."""
TIME_LIMIT = 64
"""A request like a signal's number: the time limit of the run has passed."""
_SAVE = 0.5
"""A request like a signal's number, and less than each of them: write a checkpoint and continue."""
_PR_SET_PDEATHSIG = 1
_ECHO_SECONDS = 0.3
"""A scheduler signals a launcher and its processes, and the launcher forwards the signal: both are one request."""


def end_with_parent(parent: int) -> None:
    """Make this process end when the process that started it, ``parent``, is killed (Linux)."""
    if sys.platform == "linux":
        import ctypes  # takes a while

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # killed before this call
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Stop:
    """The request to stop or to save that a command has received."""

    signal: int = 0
    """Number of the signal to stop; 0: none."""
    save: bool = False
    """Whether a checkpoint is requested."""
    saved: bool = False
    """Whether an earlier attempt left a checkpoint."""
    at_once: bool = True
    """Whether a signal ends the command immediately, since there is nothing to save."""
    message: str = "stopped"
    """Message of the error that ends the command."""
    when: float = 0.0
    """When the signal arrived, on the monotonic clock."""
    deadline: float | None = None
    """Time limit of the run, on the same clock."""
    followers: list[Stop] = field(default_factory=list)
    """Those of several runs in this command, which receive what this one does."""

    @property
    def request(self) -> float:
        """The request as a number, of which the largest among several processes counts; 0: none."""
        late = self.deadline is not None and time.monotonic() > self.deadline
        return self.signal or (TIME_LIMIT if late else _SAVE if self.save else 0)

    def to_error(self, message: str, *, saved: bool, request: float = 0) -> Interrupted:
        """Return the error that ends the run: exit code 130 after Ctrl-C, else 75 with a checkpoint, 143 without."""
        number = int(request) or self.signal
        code = 130 if number == signal.SIGINT else 75 if saved else 143
        hint = "run the same command again to resume" if saved else None
        why = "training.max_time" if number == TIME_LIMIT else signal.Signals(number).name
        return Interrupted(f"{message} ({why})", exit_code=code, hint=hint)

    def check(self) -> None:
        """Raise Interrupted if a signal arrived whose exception other code has swallowed."""
        if self.signal:
            raise self.to_error(self.message, saved=self.saved)

    def as_interrupted(self, error: BaseException) -> Interrupted | None:
        """Return the Interrupted that caused an error, or None: other code may have replaced the exception."""
        if isinstance(error, Interrupted):
            return error
        return self.to_error(self.message, saved=self.saved) if self.signal and self.at_once else None

    def on_stop_signal(self, number: int, _frame: FrameType | None = None) -> None:
        """Handle a signal to stop."""
        if self.signal:
            if number == signal.SIGHUP or (self.signal == number and time.monotonic() - self.when < _ECHO_SECONDS):
                return  # nobody closes a terminal to end a command that is stopping
            os._exit(130 if number == signal.SIGINT else 143)
        for each in (self, *self.followers):
            each.signal, each.when = number, time.monotonic()
        if self.at_once:
            self.check()

    def on_save_signal(self, _number: int, _frame: FrameType | None = None) -> None:
        """Handle the signal that requests a checkpoint."""
        for each in (self, *self.followers):
            each.save = True


_current: list[Stop] = []
"""One per active ``handle_signals`` block, the innermost last."""


def current() -> Stop:
    """Return the requests to the running command; outside of ``handle_signals``, an empty Stop."""
    return _current[-1] if _current else Stop()


def check() -> None:
    """Raise Interrupted if a signal has asked the running command to stop. Call it between parts of long work."""
    current().check()


def wants_save(request: float) -> bool:
    """Return whether a request is only for a checkpoint."""
    return request == _SAVE


@contextmanager
def handle_signals(
    message: str = "stopped", save_on: signal.Signals | None = SAVE_SIGNAL, *, last: bool = False
) -> Iterator[Stop]:
    """Record INT, TERM, USR1 and HUP in the Stop during the block; a second one but HUP ends the process.

    Outside the main thread, which alone can handle signals, nothing is recorded.

    Args:
        message: Message of the error that ends the command.
        save_on: The signal that requests a checkpoint, and then does not stop.
        last: Whether to ignore signals to stop afterwards, while the process reports how it ended.
    """
    outer = current()
    outer.check()
    stop = Stop(save=outer.save, saved=outer.saved, message=message)
    handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]] = dict.fromkeys(
        STOP_SIGNALS, stop.on_stop_signal
    )
    if save_on is not None:
        handlers[save_on] = stop.on_save_signal
    try:
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    except ValueError:  # not the main thread
        before = {}
    _current.append(stop)
    try:
        yield stop
    except Exception as error:
        if stop.signal:  # its echo may arrive after this block
            outer.signal, outer.when, outer.saved, outer.at_once = stop.signal, stop.when, stop.saved, False
        if (interrupted := stop.as_interrupted(error)) is None or interrupted is error:
            raise
        raise interrupted from error
    finally:
        _current.pop()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last and number in STOP_SIGNALS else handler)
