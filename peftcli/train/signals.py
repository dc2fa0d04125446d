"""Signals: the first asks a run to stop with a checkpoint, the second ends it at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from peftcli.errors import Interrupted

_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass
class Stop:
    """Whether a signal asked to stop."""

    signal: int = 0
    """The signal's number; 0: none came."""
    saved: bool = False
    """Whether an earlier attempt left a checkpoint."""
    at_once: bool = True
    """Whether there is nothing to save yet, so that a signal ends the run right away."""

    def interrupted(self, message: str, *, saved: bool, number: int = 0) -> Interrupted:
        """The error that ends the run: 130 after Ctrl-C; after another signal 75 with a checkpoint, 143 without."""
        number = number or self.signal
        code = 130 if number == signal.SIGINT else 75 if saved else 143
        hint = "run the same command again to go on" if saved else None
        return Interrupted(f"{message} ({signal.Signals(number).name})", exit_code=code, hint=hint)


@contextmanager
def handled() -> Iterator[Stop]:
    """Inside, INT, TERM and USR1 are noted in the Stop; a second one ends the process.

    Only a main thread can handle signals; elsewhere nothing is caught.
    """
    stop = Stop()

    def note(number: int, _frame: FrameType | None) -> None:
        if stop.signal:
            os._exit(128 + number)
        stop.signal = number
        if stop.at_once:
            raise stop.interrupted("stopped before the first step", saved=stop.saved)

    try:
        before = {number: signal.signal(number, note) for number in _HANDLED}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
