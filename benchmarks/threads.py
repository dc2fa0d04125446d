"""Wall time of a training step by the number of torch's threads and how long they spin, on a quiet or a busy machine.

The quickstart's recipe. Each side is a process with a model of its own, and all stop after their first step; from then
on they take turns, a step each. One side has one thread, one torch's own choice and spin, and one is what
``peftcli train`` does. Rounds on the machine as it is come first, then, with new processes, as many while a loop takes
one core. Needs ``make quickstart`` to have fetched the model.

    .venv/bin/python benchmarks/threads.py --rounds 8
    .venv/bin/python benchmarks/threads.py --busy --sides OMP_NUM_THREADS=1 peftcli GOMP_SPINCOUNT=1000
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

MODEL = "models/SmolLM2-135M-Instruct"
SETTINGS = {"training.eval_strategy": "no", "training.eval_on_start": False, "training.save_strategy": "no"}
SIDES = ["OMP_NUM_THREADS=1", "torch", "peftcli"]
GATE = "wall of two threads with one core taken, against one thread"
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def measure(side: str, precision: str) -> None:
    """Train in this process, a step for each line of stdin; print what each took, and the loss."""
    if side == "peftcli":
        from peftcli.system.cores import set_variables

        set_variables()
    from peftcli.recipe import load_recipe
    from peftcli.train.events import Event, Stepped
    from peftcli.train.run import train

    answers, sys.stdout = sys.stdout, sys.stderr
    since = [0.0, 0.0]

    def turn(event: Event) -> None:
        if not isinstance(event, Stepped):
            return
        took = [now - then for now, then in zip((time.perf_counter(), time.process_time()), since, strict=True)]
        size = event.result.num_tokens
        print(json.dumps([*(1000 * each / size for each in took), event.result.loss]), file=answers, flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        since[:] = time.perf_counter(), time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        settings = SETTINGS | {"training.output_dir": f"{folder}/run", "training.bf16": precision == "bf16"}
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        train(load_recipe(Path("configs/quickstart.yaml"), [*overrides, "gates={}"]), on_event=turn)


@contextmanager
def started(side: str, precision: str) -> Iterator[subprocess.Popen[str]]:
    """Inside, a process of a side waits for its turns."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    name, _, value = side.partition("=")
    own = {"QUICKSTART_MODEL": MODEL} | ({name: value} if value else {})
    command = [sys.executable, "-W", "ignore", __file__, "--side", side, "--precision", precision]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment | own, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def main() -> None:
    """Print a table for each kind of machine, and the gate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--busy", action="store_true", help="only while a loop takes one core")
    parser.add_argument(
        "--sides", nargs="*", default=SIDES, help="of them VARIABLE=VALUE has torch's own choice otherwise"
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        measure(given.side, given.precision)
        return
    for title in ("the machine as it is", "one core is taken")[given.busy :]:
        with ExitStack() as stack:
            if title == "one core is taken":
                loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                stack.callback(loop.kill)
            processes = {}
            for side in given.sides:  # one after another: peftcli looks who else runs
                processes[side] = stack.enter_context(started(side, given.precision))
                answer(processes[side])
            ratios = show(title, take_turns(processes, given.rounds))
    print(json.dumps({GATE: round(ratios.get("peftcli", 0.0), 3)}))


def answer(process: subprocess.Popen[str]) -> str:
    """Return the next line that a side prints."""
    assert process.stdout is not None
    return process.stdout.readline()


def take_turns(processes: dict[str, subprocess.Popen[str]], rounds: int) -> dict[str, list[list[float]]]:
    """Return wall and CPU seconds for 1,000 tokens, and the loss, of each step of each side."""
    found: dict[str, list[list[float]]] = {side: [] for side in processes}
    for number in range(rounds):
        for side, process in processes.items():
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            found[side].append(json.loads(answer(process)))
        losses = {round(entries[-1][2], 5) for entries in found.values()}
        print(f"round {number + 1}: losses {losses}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    return found


def show(title: str, found: dict[str, list[list[float]]]) -> dict[str, float]:
    """Print a table. Returns each side's wall time relative to that of one thread."""
    one, ratios = [wall for wall, *_ in found[SIDES[0]]], dict[str, float]()
    print(f"\n| {title} | wall s for 1,000 tokens | CPU s | wall, relative to one thread |\n| --- | --- | --- | --- |")
    for side, entries in found.items():
        wall, cpu, _ = (statistics.median(each) for each in zip(*entries, strict=True))
        ratios[side] = statistics.median(mine / theirs for (mine, *_), theirs in zip(entries, one, strict=True))
        print(f"| {side} | {wall:.2f} ({min(entries)[0]:.2f}) | {cpu:.2f} | {ratios[side]:.2f} |")
    return ratios


if __name__ == "__main__":
    main()
