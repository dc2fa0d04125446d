"""Of two signals that are one request, the second does no harm, whenever it comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from peftcli.errors import Interrupted, StorageError
from peftcli.system.signals import handle_signals


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stopped_twice() -> None:
    """A run that a signal stops, and the same signal again as it ends."""
    with handle_signals():
        try:
            with handle_signals("stopped before the first step") as stop:
                stop.at_once = False
                terminate()
                raise stop.to_error("stopped after step 3", saved=True)
        finally:
            terminate()


def failed_after_a_signal() -> None:
    with handle_signals(), handle_signals() as stop:
        stop.at_once = False
        terminate()
        raise StorageError("no space")


def test_an_echo_that_comes_when_the_run_is_over() -> None:
    with pytest.raises(Interrupted, match=r"stopped after step 3 \(SIGTERM\)") as caught:
        stopped_twice()
    assert caught.value.exit_code == 75


def test_what_fails_after_a_signal_is_still_what_failed() -> None:
    with pytest.raises(StorageError, match="no space"):
        failed_after_a_signal()


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ("with handle_signals(last=True): pass", 0),
        ("with handle_signals(): pass", -signal.SIGTERM),
        ("sys.argv[1:] = ['--version']; main()", 0),
    ],
)
def test_a_process_that_only_says_how_it_ended(ends: str, code: int) -> None:
    program = (
        "import os, signal, sys; from peftcli.system.signals import handle_signals; from peftcli.cli.app import main\n"
        f"{ends}\n"
        "os.kill(os.getpid(), signal.SIGTERM)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == code


@pytest.mark.parametrize(
    ("at_start", "ends"), [(signal.SIG_DFL, "stopped after step 3 (SIGHUP), 75"), (signal.SIG_IGN, "no")]
)
def test_a_closed_terminal_stops_a_command_once_unless_it_was_started_with_nohup(at_start: int, ends: str) -> None:
    program = (
        "import os, signal; from peftcli.system.signals import handle_signals\n"
        "with handle_signals() as stop:\n"
        "    stop.at_once = False\n"
        "    os.kill(os.getpid(), signal.SIGHUP); stop.when -= 1; os.kill(os.getpid(), signal.SIGHUP)\n"
        "    error = stop.to_error('stopped after step 3', saved=True) if stop.request else None\n"
        "print(f'{error.message}, {error.exit_code}' if error else 'no')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, at_start),
    )  # fmt: skip
    assert done.stdout.strip() == ends
