"""How long `peftcli inspect` takes over many rows, and in how much memory: with an empty token cache, then a full one.

The rows are the quickstart's conversations, each with a number of its own in its question. So nearly all of them are
near duplicates of one another, which is the case in which the audit has most to compare. Needs ``make quickstart`` to
have fetched the model; only its tokenizer is loaded.

    .venv/bin/python benchmarks/inspect_rows.py --rows 100000
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "models/SmolLM2-135M-Instruct"
SOURCE = Path("configs/quickstart/train.jsonl")


def write_rows(path: Path, count: int) -> None:
    """The quickstart's rows again and again, numbered."""
    rows = [json.loads(line) for line in SOURCE.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question, answer = (turn["content"] for turn in rows[number % len(rows)]["messages"])
            asked = f"Function {number}. {question}"
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def write_recipe(path: Path, data: Path) -> None:
    """A recipe over them."""
    path.write_text(
        f"base_model: {MODEL}\ntask: causal_lm\nmethod: {{type: lora}}\n"
        f"dataset: {{train: {data}, max_length: 512}}\ntraining: {{output_dir: {path.parent}/out}}\n"
    )


def measure(recipe: Path, cache: Path) -> dict[str, float]:
    """One run of the command: seconds, CPU seconds of all threads, peak memory in MiB."""
    command = [sys.executable, "-m", "peftcli", "inspect", str(recipe), "--rows", "3", "--json", "--quiet"]
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, env={**os.environ, "PEFTCLI_CACHE": str(cache)})
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"inspect ended with exit code {process.returncode}")
        output.seek(0)
        found = json.load(output)["audit"]["train"]
    return {
        "rows": found["rows"],
        "tokens": found["tokens"],
        "near": found["duplicates"]["near"],
        "seconds": seconds,
        "cpu": used.ru_utime + used.ru_stime,
        "peak": used.ru_maxrss / 1024,
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    count = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "train.jsonl", count)
        write_recipe(folder / "recipe.yaml", folder / "train.jsonl")
        results = {state: measure(folder / "recipe.yaml", folder / "cache") for state in ("empty", "full")}
    print("| token cache | rows | tokens | near duplicates | s | CPU s | peak RSS MiB |\n|---|---|---|---|---|---|---|")
    for state, found in results.items():
        print(
            f"| {state} | {found['rows']:,} | {found['tokens']:,} | {found['near']:,} | {found['seconds']:.1f} "
            f"| {found['cpu']:.1f} | {found['peak']:,.0f} |"
        )


if __name__ == "__main__":
    main()
