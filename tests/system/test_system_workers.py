"""Worker processes: in order, one error, no orphans."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from peftcli.errors import DataError, Interrupted, PeftcliError, Problem, ProcessDied, RecipeError
from peftcli.system import workers
from peftcli.system.workers import compute_ahead


def children() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid]


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_come_in_order(num_workers: int) -> None:
    def square(number: int) -> tuple[int, bytes]:
        time.sleep(0.01 * (number % 3 == 0))
        return number**2, bytes(1 << 20)  # more than a pipe holds

    found = list(compute_ahead(square, range(8), num_workers))
    assert [first for first, _ in found] == [number**2 for number in range(8)]
    assert list(compute_ahead(square, [], num_workers)) == []
    assert children() == []


def test_each_worker_is_one_item_ahead(tmp_path: Path) -> None:
    taken = []

    def items() -> Any:
        for number in range(10):
            taken.append(number)
            yield number

    with closing(compute_ahead(lambda number: (tmp_path / f"{number}").touch(), items(), 2)) as results:
        next(results)
        assert taken == [0, 1, 2]
        until(lambda: {path.name for path in tmp_path.iterdir()} == {"0", "1", "2"})
    assert children() == []


@pytest.mark.grid
@pytest.mark.parametrize(
    "error",
    [
        DataError("cannot be read", file="a.jpg", hint="Mend it."),
        RecipeError([Problem("cannot be read", "a.yaml", 3)]),
        Interrupted("cannot be read", exit_code=75),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_the_one_that_was_raised(error: PeftcliError) -> None:
    def read(number: int) -> int:
        if number == 3:
            raise error
        return number if number != 5 else 1 // 0

    results = compute_ahead(read, range(9), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(type(error), match="cannot be read") as caught:
        next(results)
    assert vars(caught.value) == vars(error)
    assert children() == []
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        list(compute_ahead(read, [5], 1))


def test_a_worker_that_is_killed_ends_the_rest() -> None:
    results = compute_ahead(lambda number: number, range(9), 2)
    next(results)
    os.kill(children()[1], signal.SIGKILL)
    with pytest.raises(ProcessDied, match="SIGKILL"):
        list(results)
    assert children() == []


def test_a_worker_that_is_killed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*args: Any) -> Any:
        process, channel = original(*args)
        process.kill()
        process.join()
        return process, channel

    original = workers._start
    monkeypatch.setattr(workers, "_start", start)
    with pytest.raises(ProcessDied, match="SIGKILL"):
        list(compute_ahead(lambda number: number, range(9), 2))


def test_workers_leave_signals_to_their_parent_and_end_with_it(tmp_path: Path) -> None:
    def parent() -> None:
        results = compute_ahead(lambda number: number, range(9), 2)
        next(results)
        for pid in children():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(pid, number)
        assert list(results) == list(range(1, 9))
        results = compute_ahead(lambda number: number, range(9), 2)
        next(results)
        (tmp_path / "made").write_text(" ".join(map(str, children())))
        (tmp_path / "made").rename(tmp_path / "pids")
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    until((tmp_path / "pids").exists)
    pids = list(map(int, (tmp_path / "pids").read_text().split()))
    assert len(pids) == 2
    assert all(map(is_alive, pids))
    process.kill()
    process.join()
    until(lambda: not any(map(is_alive, pids)))
