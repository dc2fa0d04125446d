"""The quickstart's time, now and before the work on speed, on a quiet machine and beside a job that takes one core.

The whole of ``peftcli train configs/quickstart.yaml``, with threads as they come and an empty cache. Wall time means
something only where nothing else runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from common import BEFORE, MODEL, ROOT, Cell, Found, Part, answer, earlier_version, middle

VERSIONS = ("peftcli", f"peftcli at {BEFORE}")
_SPIN = "while True: pass"


def measure(side: str, busy: bool, round: int = 0, steps: int = -1) -> dict[str, Any]:
    """Run the quickstart's training once.

    Args:
        side: Which version.
        busy: Whether another job takes one core.
        round: Which of the repetitions.
        steps: So many only; -1: all.
    """
    source = ROOT if side == "peftcli" else earlier_version()
    spinning = subprocess.Popen([sys.executable, "-c", _SPIN]) if busy else None
    try:
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
            settings = [f"training.output_dir={folder}/run", f"training.max_steps={steps}", "gates={}"]
            command = [sys.executable, "-m", "peftcli", "train", "configs/quickstart.yaml", *settings, "--json"]
            added = {
                "QUICKSTART_MODEL": str(ROOT / MODEL),
                "PEFTCLI_CACHE": f"{folder}/cache",
                "PYTHONPATH": str(source),
            }
            started = time.perf_counter()
            process = subprocess.Popen(command, cwd=source, env={**os.environ, **added}, stdout=output)
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"the quickstart ended with exit code {process.returncode}")
            output.seek(0)
            run = json.load(output)
    finally:
        if spinning:
            spinning.kill()
            spinning.wait()
    loss = run["eval"]["kept"]["eval_loss"]
    return {"wall": seconds, "cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss / 1024, "eval_loss": loss}


def cells(rounds: int) -> Iterator[Cell]:
    """Each version, quiet and busy, in turns."""
    for round in range(rounds):
        for busy in (False, True):
            yield from ({"side": side, "busy": busy, "round": round} for side in VERSIONS)


def section(found: Found) -> Iterator[str]:
    """A line for each version and state of the machine."""
    yield "## The quickstart"
    yield from ("", *(line for line in (__doc__ or "").strip().splitlines() if line), "")
    yield "| machine | version | wall, s | CPU, s | peak RSS, MiB | eval loss | times as fast as before |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for busy in (False, True):
        for side in VERSIONS:
            each = {key: found.each(key, side=side, busy=busy) for key in ("wall", "cpu", "peak", "eval_loss")}
            gains = found.ratios("wall", {"side": VERSIONS[1], "busy": busy}, {"side": side, "busy": busy})
            figures = [middle(values, digits) for values, digits in zip(each.values(), (1, 1, 0, 4), strict=True)]
            yield f"| {'one core taken' if busy else 'quiet'} | {side} | {' | '.join(figures)} | {middle(gains)} |"


PARTS = {"quickstart": Part("quickstart", cells, section, 40, threads=None)}

if __name__ == "__main__":
    answer(measure)
