"""Wall time of a training step by the number of torch's threads and how long they spin, on a quiet or a busy machine.

The quickstart's recipe. Each side is a process with a model of its own, and all stop before their second step; from
then on they take turns, a step each. The first side has one thread, the second torch's own choice, and the third is
what ``peftcli train`` does. With ``--busy`` a loop takes one core meanwhile. Needs ``make quickstart`` to have fetched
the model.

    .venv/bin/python benchmarks/threads.py --rounds 8 --busy
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
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def measure(side: str, precision: str) -> None:
    """Train in this process, a step for each line of stdin; print what each took, and the loss."""
    if side == "peftcli":
        from peftcli.system.cores import bound_spinning

        bound_spinning()
    from peftcli.recipe import load_recipe
    from peftcli.train.report import Event, Stepped
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
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--busy", action="store_true", help="a loop takes one core")
    parser.add_argument("--more", nargs="*", default=[], metavar="VARIABLE=VALUE", help="sides with torch's threads")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        measure(given.side, given.precision)
        return
    sides = ["OMP_NUM_THREADS=1", "torch's own", "peftcli", *given.more]
    found: dict[str, list[list[float]]] = {side: [] for side in sides}
    with ExitStack() as stack:
        processes = {side: stack.enter_context(started(side, given.precision)) for side in sides}
        for process in processes.values():
            process.stdout.readline()  # type: ignore[union-attr]
        if given.busy:
            loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(loop.kill)
        for number in range(given.rounds):
            for side, process in processes.items():
                process.stdin.write("\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                found[side].append(json.loads(process.stdout.readline()))  # type: ignore[union-attr]
            losses = {round(entries[-1][2], 5) for entries in found.values()}
            print(f"round {number + 1}: losses {losses}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    one = [wall for wall, *_ in found[sides[0]]]
    print("| threads | wall s for 1,000 tokens | CPU s | wall, relative to one thread |\n| --- | --- | --- | --- |")
    for side, entries in found.items():
        wall, cpu, _ = (statistics.median(each) for each in zip(*entries, strict=True))
        ratio = statistics.median(mine / theirs for (mine, *_), theirs in zip(entries, one, strict=True))
        print(f"| {side} | {wall:.2f} ({min(entries)[0]:.2f}) | {cpu:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
