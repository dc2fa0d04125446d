"""Groups of training processes of which one dies, raises, ends, stops or hangs, and groups that end at any time."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trainkit
from campaigns import Campaign, Trial
from training import assert_same
from trainkit import FULL, Child, read_run, write_recipe

_AT_STEP = 5
"""The first checkpoint is that of step 3."""
_LONGEST = 30.0
"""Seconds from the fault to the end of all processes."""


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise RuntimeError("a planted fault")


def _leave() -> None:
    os._exit(0)


def _leave_by_system_exit() -> None:
    sys.exit(0)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _sleep() -> None:
    time.sleep(600)


def _diverge() -> None:
    from peftcli.errors import Diverged

    raise Diverged("the loss of step 5 is not finite")


def _segfault() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


FAULTS: dict[str, tuple[Callable[[], None], int, str]] = {
    "is killed": (_kill, 10, "was killed by SIGKILL"),
    "raises": (_raise, 10, "a planted fault"),
    "exits with 0": (_leave, 10, "ended with 0 before its work was done"),
    "ends by SystemExit": (_leave_by_system_exit, 10, "SystemExit"),
    "is stopped": (_stop, 10, "was stopped from outside"),
    "sleeps": (_sleep, 10, "wait for one another"),
    "crashes": (_segfault, 10, "was killed by SIGSEGV"),
    "diverges": (_diverge, 9, "the loss of step 5 is not finite"),
}
"""What happens to a process: the exit code of the command, and what it says."""


@dataclass(frozen=True)
class Launcher:
    """Lets peftcli's launcher fork its processes from this one, which has torch loaded, and plants a fault in one."""

    fault: str
    number: int
    marks: Path
    """The folder in which the faulty process says when it was struck, and all processes what their ids are."""

    def __call__(self) -> None:
        launcher = self

        class Forked(subprocess.Popen):
            """A process that is forked instead of started anew."""

            def __init__(self, command: list[str], *, env: dict[str, str], **how: object):
                fault = launcher if env["RANK"] == str(launcher.number) else None
                words = [sys.executable, str(Path(__file__).with_name("rank.py")), str(launcher.marks)]
                words += [fault.fault if fault else "-", *command[3:]]
                super().__init__(words, env=env, **how)

        subprocess.Popen = Forked


def strike(fault: str, marks: Path) -> None:
    """In a process: let the fault happen in the fifth step."""
    (marks / f"pid-{os.getpid()}").touch()
    if fault == "-":
        return
    from peftcli.train.plan import Plan

    global_batch = Plan.global_batch

    def watched(self: Plan, step: int) -> list[int]:
        if step == _AT_STEP - 1:
            (marks / "struck").write_text(str(time.monotonic()))
            FAULTS[fault][0]()
        return global_batch(self, step)

    Plan.global_batch = watched


def _living(marks: Path) -> list[int]:
    found = []
    for mark in marks.glob("pid-*"):
        pid = int(mark.name.removeprefix("pid-"))
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            found.append(pid)
    return found


def _settings(count: int, strategy: str) -> tuple[str, ...]:
    # the same global batch, however many processes
    of_launch = f"launch.num_processes={count}", f"launch.strategy={strategy}"
    groups = ("launch.shard_size=2",) if strategy == "hybrid" else ()
    return (*FULL, "training.per_device_train_batch_size=1", *of_launch, *groups)


def _faulty(fault: str, number: int, count: int, strategy: str, folder: Path) -> None:
    """One process of a group fails: the command ends, says why, and the same command goes on."""
    recipe, marks = write_recipe(folder), folder / "marks"
    marks.mkdir()
    child = Child(folder, "train", recipe, *_settings(count, strategy), before=Launcher(fault, number, marks))
    code = child.wait(150)
    ended = time.monotonic()
    _, expected, words = FAULTS[fault]
    struck = marks / "struck"
    assert struck.exists(), f"the fault did not happen: {child.err}"
    took = ended - float(struck.read_text())
    assert code == expected, f"exit code {code}, not {expected}: {child.err}"
    assert took < _LONGEST, f"it took {took:.0f} s"
    errors = [line for line in child.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, f"{len(errors)} errors: {child.err}"
    assert words in child.err[child.err.index("error:") :], child.err
    assert "Traceback" not in child.err, child.err
    run = read_run(folder / "out")
    assert run["status"] in ("failed", "interrupted"), run["status"]
    assert run["resumable"], "the checkpoint of step 3 stands"
    left = _living(marks)
    assert not left, f"orphans: {left}"
    whole = folder / "whole"
    settings = _settings(count, strategy)
    for out in (folder / "out", whole):
        again = Child(folder, "train", recipe, *settings, f"training.output_dir={out}", before=Launcher("-", -1, marks))
        assert again.wait(150) == 0, again.err
    assert_same(folder / "out", whole)


def _signalled(number: int, count: int, strategy: str, folder: Path) -> None:
    """A signal to the launcher, or to the launcher and all processes at once, as a scheduler sends it."""
    recipe, marks = write_recipe(folder), folder / "marks"
    marks.mkdir()
    child = Child(folder, "train", recipe, *_settings(count, strategy), before=Launcher("-", -1, marks))
    metrics = folder / "out/metrics.jsonl"
    child.until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
    for pid in _living(marks):
        os.kill(pid, number)
    child.signal(number)
    code = child.wait(100)
    assert code in (0, 130 if number == signal.SIGINT else 75), f"{code}: {child.err}"
    assert not _living(marks)
    assert code == 0 or read_run(folder / "out")["status"] == "interrupted"
    again = Child(folder, "train", recipe, *_settings(count, strategy), before=Launcher("-", -1, marks))
    assert again.wait(150) == 0, again.err


def _launcher_killed(strategy: str, folder: Path) -> None:
    """The launcher is killed: no process outlives it, the lock is free, and the same command goes on."""
    recipe, marks = write_recipe(folder), folder / "marks"
    marks.mkdir()
    child = Child(folder, "train", recipe, *_settings(2, strategy), before=Launcher("-", -1, marks))
    metrics = folder / "out/metrics.jsonl"
    child.until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
    child.signal(signal.SIGKILL)
    child.wait()
    deadline = time.monotonic() + 10
    while _living(marks) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _living(marks), "orphans"
    again = Child(folder, "train", recipe, *_settings(2, strategy), before=Launcher("-", -1, marks))
    assert again.wait(150) == 0, again.err


SEEDS = 30
"""Trials at random times."""
_ENDS = ("all are killed", "the launcher is killed", "a process is killed", "SIGTERM", "SIGINT", "SIGUSR1")
_CODES = {"SIGTERM": 75, "SIGINT": 130, "SIGUSR1": 75, "a process is killed": 10}
"""How the command ends then, unless it is killed itself."""


@functools.cache
def _undisturbed(strategy: str) -> Path:
    folder = trainkit.scratch() / f"undisturbed-{strategy}"
    (folder / "marks").mkdir(parents=True)
    child = _long(strategy, write_recipe(folder), folder / "marks")
    assert child.wait(150) == 0, child.err
    return folder / "out"


def _long(strategy: str, recipe: Path, marks: Path) -> Child:
    """Start a run of two processes, or groups, with more steps than others here, each of which is logged."""
    count = 4 if strategy == "hybrid" else 2
    settings = (*_settings(count, strategy), "training.max_steps=24", "training.logging_steps=1")
    return Child(recipe.parent, "train", recipe, *settings, before=Launcher("-", -1, marks))


def _at_any_time(seed: int, strategy: str, ends: Sequence[str], folder: Path) -> None:
    """The command ends so on the way, once or more often; started again, it ends as if it had not."""
    chance, recipe, marks = random.Random(f"{strategy} {seed}"), write_recipe(folder), folder / "marks"
    marks.mkdir()
    metrics = folder / "out/metrics.jsonl"
    for end, how in enumerate(ends):
        child = _long(strategy, recipe, marks)
        lines = _lines(metrics)
        _wait_for_lines(child, metrics, chance.randint(lines + 1, 18) if lines < 18 else lines + 1)
        time.sleep(chance.uniform(0, 0.1))
        processes = _living(marks)
        if how in signal.Signals.__members__:
            child.signal(signal.Signals[how])
        elif how == "a process is killed":
            with suppress(ProcessLookupError, IndexError):
                os.kill(chance.choice(processes), signal.SIGKILL)
        else:
            child.signal(signal.SIGKILL)
            for pid in processes if how == "all are killed" else ():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        code = child.wait(150)
        wanted = {_CODES.get(how, -signal.SIGKILL)} | ({0} if end else set())  # a later one may come too late
        assert code in wanted, f"{how}: exit code {code}: {child.err}"
        deadline = time.monotonic() + 10
        while _living(marks) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not _living(marks), f"{how}: orphans"
    again = _long(strategy, recipe, marks)
    assert again.wait(150) == 0, again.err
    assert_same(folder / "out", _undisturbed(strategy))


def _ends(seed: int) -> list[str]:
    return [_ENDS[(seed // 3 + end) % len(_ENDS)] for end in range(1 + seed % 3)]


def _wait_for_lines(child: Child, metrics: Path, count: int) -> None:
    child.until(lambda: child.process.exitcode is not None or _lines(metrics) >= count)


def _lines(metrics: Path) -> int:
    return metrics.read_text().count("\n") if metrics.exists() else 0


Group = tuple[str, int, int]
"""What happens, to which process, of how many."""
_IN_TWO = [(fault, number, 2) for fault in FAULTS for number in (0, 1)]
_IN_MORE = [("is killed", 2, 3), ("sleeps", 1, 3), ("is stopped", 3, 4), ("raises", 0, 4), ("exits with 0", 2, 4)]


def trials(strategy: str, groups: Sequence[Group]) -> Sequence[Trial]:
    """The groups, and signals."""
    made = [
        Trial(f"process {number} of {count} {fault}", partial(_faulty, fault, number, count, strategy))
        for fault, number, count in groups
    ]
    made += [
        Trial(
            f"{signal.Signals(number).name} to the launcher and all of {count}",
            partial(_signalled, number, count, strategy),
        )
        for number, count in ((signal.SIGTERM, 2), (signal.SIGINT, 2), (signal.SIGUSR1, 3))
    ]
    return [*made, Trial("the launcher is killed", partial(_launcher_killed, strategy))]


_PROMISE = (
    "The command ends within 30 seconds with exit code 10 (or that of its own error), says one error, the "
    "first; no process is left; the same command ends byte-identical to a group that did not fail."
)
CAMPAIGNS = [
    Campaign("processes that fail", _PROMISE, partial(trials, "replicate", [*_IN_TWO, *_IN_MORE]), least=20, sample=0),
    Campaign(
        "processes that fail, the base model divided",
        _PROMISE,
        partial(trials, "fsdp", _IN_TWO[1::2]),
        least=12,
        sample=0,
    ),
    Campaign(
        "groups that end at any time, the base model divided",
        "Whatever ends a group, once or more often, no process is left, and the same command ends byte-identical.",
        lambda: [Trial(f"seed {seed}", partial(_at_any_time, seed, "fsdp", _ends(seed))) for seed in range(SEEDS)],
        least=30,
        sample=0,
    ),
    Campaign(
        "groups of two processes that each divide the base model",
        "Whichever process is lost at any time, no process is left, and the same command ends byte-identical.",
        lambda: [Trial(f"seed {seed}", partial(_at_any_time, seed, "hybrid", _ENDS[2:3])) for seed in range(20)],
        least=20,
        sample=0,
    ),
]
