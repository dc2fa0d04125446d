"""That the kills and faults of this folder happen, and that what must not survive them does not."""

from __future__ import annotations

from pathlib import Path

import kills
import pytest
import strace
from naive_saver import NAIVE, naive_failures, naive_trials

WEIGHTS = "out/adapter_model.safetensors"


@pytest.mark.slow
def test_the_naive_saver_fails() -> None:
    trials = naive_trials()
    counts = naive_failures([*trials[10::15], *trials[-8:-4]])
    assert counts["failed"] >= 2


def test_a_kill_comes_before_its_call(tmp_path: Path) -> None:
    strace.require()
    writes = [point for point in kills.points(NAIVE) if (point.syscall, point.path) == ("write", WEIGHTS)]
    strace.inject(NAIVE.start, tmp_path, writes[1], "signal=SIGKILL")
    assert (tmp_path / WEIGHTS).read_bytes() == b""
    assert len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 2


def test_an_error_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    strace.require()
    writes = [point for point in kills.points(NAIVE) if (point.syscall, point.path) == ("write", WEIGHTS)]
    assert "No space left on device" in strace.inject(NAIVE.start, tmp_path, writes[0], "error=ENOSPC").err


def test_a_fault_that_does_not_happen_is_no_success(tmp_path: Path) -> None:
    strace.require()
    never = strace.Point("write", WEIGHTS, 1000, "a write too many")
    with pytest.raises(strace.DidNotHappen, match="a write too many"):
        strace.inject(NAIVE.start, tmp_path, never, "signal=SIGKILL")
