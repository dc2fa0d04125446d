"""Four LoRA recipes trained together, against one after another: CPU time of a step, and memory.

Each side runs one thread. The recipes differ in r, learning rate and order of the data; one after another, each has a
process of its own. The losses of the first two steps must agree. A step is one of all four: measured is the CPU time
from the end of the first to the end of the last, and that from the start of the process to the end of the first. Of the
memory there are two ratios: to the four processes side by side, and to the largest of them. Needs ``make quickstart``
to have fetched the model.

A step of two rows of the quickstart keeps a core busy by itself; one of a single short row does not.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/together.py --rounds 3
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rows import rows

MODEL = "models/SmolLM2-135M-Instruct"
R = (8, 16, 16, 32)
QUICKSTART, SHORT = "the quickstart's rows, two a step", "short rows, one a step"
BATCH, STEPS = {QUICKSTART: 2, SHORT: 1}, {QUICKSTART: 5, SHORT: 24}
SHARED = "several adapters together against one after another"
GATES = {
    (SHORT, "step"): f"{SHARED}, speed of short rows",
    (QUICKSTART, "step"): f"{SHARED}, speed of rows that fill a step",
    (QUICKSTART, "peak"): "several adapters together against as many processes side by side, memory",
}


def data_of(kind: str, folder: Path) -> str:
    """The file of the rows."""
    if kind == QUICKSTART:
        return "configs/quickstart/train.jsonl"
    path = folder / "short.jsonl"
    path.write_text("".join(json.dumps(row["row"]) + "\n" for row in rows("short", 0, 60)))
    return str(path)


def recipe(number: int, folder: str, options: argparse.Namespace) -> Any:
    """One of the four recipes."""
    from peftcli.schema import BaseModel, Dataset, Recipe, Training

    return Recipe(
        base_model=BaseModel(name=MODEL),
        task={"type": "causal_lm"},
        method={"type": "lora", "r": R[number], "lora_alpha": 32, "target_modules": "all-linear"},
        dataset=Dataset(train=data_of(options.kind, Path(folder)), max_length=512),
        training=Training(
            output_dir=f"{folder}/run-{number}",
            seed=number,
            max_steps=STEPS[options.kind],
            per_device_train_batch_size=BATCH[options.kind],
            learning_rate=1e-4 * (number + 1),
            save_strategy="no",
            eval_strategy="no",
            bf16=not options.fp32,
            logging_steps=1,
            verify=False,
        ),
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train one recipe in this process, or all."""
    from peftcli.system.cores import set_variables

    set_variables()
    from peftcli.train.events import Stepped
    from peftcli.train.run import train
    from peftcli.train.together import train_together

    times, losses = dict[int, float](), dict[int, list[float]]()

    def note(number: int, event: object) -> None:
        if isinstance(event, Stepped):
            times[event.result.step] = time.process_time()  # of the last run that does it
            losses.setdefault(number, []).append(event.result.loss)

    with tempfile.TemporaryDirectory() as folder:
        if options.side == "together":
            recipes = {str(number): recipe(number, folder, options) for number in range(len(R))}
            train_together(recipes, on_event=lambda name: lambda event: note(int(name), event))
        else:
            number = int(options.side)
            train(recipe(number, folder, options), on_event=lambda event: note(number, event))
    last = STEPS[options.kind]
    return {
        "step": (times[last] - times[1]) / (last - 1),
        "start": times[1],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "losses": losses,
    }


def main() -> None:
    """Alternate the sides and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fp32", action="store_true")
    parser.add_argument("--kind", choices=BATCH)
    parser.add_argument("--side")
    options = parser.parse_args()
    if options.side:
        print("RESULT " + json.dumps(measure(options)))
        return
    gates = dict[str, float]()
    for kind in [options.kind] if options.kind else BATCH:
        gates |= compare(kind, options.rounds)
    print(json.dumps(gates))


def compare(kind: str, rounds: int) -> dict[str, float]:
    """Measure both sides on rows of a kind, print a table, and return the gates."""
    together, alone = list[dict[str, Any]](), list[list[dict[str, Any]]]()
    for _ in range(rounds):
        found = dict[str, dict[str, Any]]()
        for side in ("together", *map(str, range(len(R)))):
            command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--kind", kind, "--side", side]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            line = next(line for line in output.splitlines() if line.startswith("RESULT "))
            found[side] = json.loads(line.removeprefix("RESULT "))
        together.append(found.pop("together"))
        alone.append(list(found.values()))
        for number, losses in together[-1]["losses"].items():
            own = found[number]["losses"][number]
            if any(abs(a - b) > 0.01 for a, b in zip(losses[:2], own[:2], strict=True)):
                raise SystemExit(f"recipe {number} has other losses: {losses} and {own}")
    gates, many = dict[str, float](), "four processes side by side"
    print(f"{kind}:\n\n| | together | one after another | ratio |\n|---|---|---|---|")
    for name, key, of in (
        ("CPU s a step of all four", "step", sum),
        ("CPU s to the end of the first step", "start", sum),
        (f"peak RSS, MiB, against {many}", "peak", sum),
        ("peak RSS, MiB, against the largest process", "peak", max),
    ):
        ours = statistics.median(each[key] for each in together)
        theirs = statistics.median(of(one[key] for one in each) for each in alone)
        print(f"| {name} | {ours:,.2f} | {theirs:,.2f} | {theirs / ours:.2f} |")
        if of is sum and (kind, key) in GATES:
            gates[GATES[kind, key]] = round(theirs / ours, 3)
    print()
    return gates


if __name__ == "__main__":
    main()
