"""Useful tokens per CPU second: packed rows against padded batches, on the quickstart's model.

All sides go once over the same conversations, made of the quickstart's rows, of 42 to 512 tokens. Each runs one thread
in a process of its own, the processes take turns, and with a learning rate of 0 the loss over all targets must come
out the same. Measured is the process's CPU time over the steps, and its peak memory. Padded batches hold about as many
useful tokens as a packed row. One side packs with SDPA's own attention, which computes all pairs of a row's tokens and
masks most of them. Needs ``make quickstart`` to have fetched the model.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/packing_cpu.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODEL, ROWS = "models/SmolLM2-135M-Instruct", "configs/quickstart/train.jsonl"
SHORTEST, LONGEST, ROW_LENGTH, COUNT, BATCH = 42, 512, 1024, 30, 5
SIDES = {
    "padded, random": {"train_sampling_strategy": "random"},
    "padded, grouped by length": {"train_sampling_strategy": "group_by_length"},
    "packed, SDPA with a mask": {"train_sampling_strategy": "random"},
    "packed": {"train_sampling_strategy": "random"},
}


def turns() -> Iterator[list[dict[str, str]]]:
    """Questions with their answers: a function's docstring, a function of that docstring, a docstring in capitals."""
    for line in Path(ROWS).read_text(encoding="utf-8").splitlines():
        question, answer = (message["content"] for message in json.loads(line)["messages"])
        code = question.split("```python\n")[1].removesuffix("\n```")
        for asked, said in [(question, answer), (f"Write it: {answer}", code), (answer, answer.upper())]:
            yield [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def conversations(tokenizer: Any) -> list[list[dict[str, str]]]:
    """Turns joined until a length is reached, drawn so that short ones are as frequent as in chat data."""
    generator = random.Random(0)
    pool, made = list(turns()), []

    def length(messages: list[dict[str, str]]) -> int:
        return len(tokenizer.apply_chat_template(messages)["input_ids"])

    while len(made) < COUNT:
        wanted = math.exp(generator.uniform(math.log(SHORTEST), math.log(LONGEST)))
        messages: list[dict[str, str]] = []
        for turn in generator.sample(pool, 40):
            if length(messages + turn) <= wanted:
                messages += turn
        if messages and length(messages) >= 0.7 * wanted:
            made.append(messages)
    return made


def recipe(folder: str, side: str, dtype: str) -> Any:
    """What all sides train; with packing, about as many useful tokens are in a batch."""
    from peftcli.schema import BaseModel, Dataset, Recipe, Training

    packs = side.startswith("packed")
    return Recipe(
        base_model=BaseModel(name=MODEL, dtype=dtype),
        task="causal_lm",
        method={"type": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        dataset=Dataset(train=f"{folder}/train.jsonl", max_length=ROW_LENGTH, packing=packs),
        training=Training(
            output_dir=f"{folder}/run",
            num_train_epochs=1,
            per_device_train_batch_size=1 if packs else BATCH,
            learning_rate=0.0,
            bf16=dtype == "bfloat16",
            **SIDES[side],
        ),
    )


def measure(side: str, dtype: str) -> dict[str, float]:
    """Train one side in this process."""
    from peftcli.models.open import open_base
    from peftcli.recipe import method_config
    from peftcli.tasks import open_task
    from peftcli.train.data import load_data, plan_of
    from peftcli.train.loop import fit
    from peftcli.train.packing_check import start_packing
    from peftcli.train.setup import adapted_model, prepare, start_accelerator

    with tempfile.TemporaryDirectory() as folder:
        followed = recipe(folder, side, dtype)
        task = open_task(followed, open_base(followed.base_model))
        lines = [json.dumps({"messages": each}) for each in conversations(task.processor)]
        Path(folder, "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
        config, accelerator = method_config(followed), start_accelerator(followed)
        data = load_data(followed, task)
        plan = plan_of(followed, data, 1)
        prepared = prepare(adapted_model(followed, config, task)[0], config, followed, plan, accelerator)
        if side == "packed":
            start_packing(accelerator.unwrap_model(prepared.model), task, accelerator)
        started, wall = time.process_time(), time.perf_counter()
        steps = list(fit(prepared, task, data.train, plan, accelerator))
        spent, waited = time.process_time() - started, time.perf_counter() - wall
    num_tokens, num_targets = sum(step.num_tokens for step in steps), sum(step.num_targets for step in steps)
    lengths = data.train.sizes
    return {
        "tokens": num_tokens,
        "targets": num_targets,
        "shortest": int(lengths.min()),
        "longest": int(lengths.max()),
        "steps": len(steps),
        "loss": sum(step.loss * step.num_targets for step in steps) / num_targets,
        "useful": plan.efficiency,
        "per_second": num_tokens / spent,
        "wall_over_cpu": waited / spent,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Alternate the sides and print the medians as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--side", choices=SIDES)
    arguments = parser.parse_args()
    if arguments.side:
        print("RESULT " + json.dumps(measure(arguments.side, arguments.dtype)))
        return
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(arguments.rounds):
        for side in SIDES:
            command = [sys.executable, "-W", "ignore", __file__, "--side", side, "--dtype", arguments.dtype]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            line = next(line for line in output.splitlines() if line.startswith("RESULT "))
            results[side].append(json.loads(line.removeprefix("RESULT ")))
            print(f"round {number + 1}, {side}: {line}", file=sys.stderr, flush=True)
    entries = [entry for side in results.values() for entry in side]
    for key in ("tokens", "targets"):
        if len({entry[key] for entry in entries}) > 1:
            raise SystemExit(f"the sides do not train the same {key}")
    losses = [entry["loss"] for entry in entries]
    if max(losses) - min(losses) > (1e-4 if arguments.dtype == "float32" else 3e-2):
        raise SystemExit(f"the sides do not compute the same loss: {losses}")
    medians = {
        side: {key: statistics.median(e[key] for e in each) for key in each[0]} for side, each in results.items()
    }
    slowest = medians["padded, random"]["per_second"]
    print(
        "| | steps | useful | useful tokens/CPU s | against random batches | peak RSS MiB |\n|---|---|---|---|---|---|"
    )
    for side, values in medians.items():
        print(
            f"| {side} | {values['steps']:.0f} | {values['useful']:.0%} | {values['per_second']:.0f} "
            f"| {values['per_second'] / slowest:.2f} | {values['peak']:.0f} |"
        )
    first = entries[0]
    print(
        f"{COUNT} conversations of {first['shortest']:.0f} to {first['longest']:.0f} tokens, mean "
        f"{first['tokens'] / COUNT:.0f}, {first['targets'] / first['tokens']:.0%} targets; padded batches of {BATCH}, "
        f"packed rows of {ROW_LENGTH} one by one; {arguments.dtype}, one thread, {arguments.rounds} rounds",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
