"""Does ``forgetting`` find what was planted, and nothing where nothing was? Prints the table of docs/forgetting.md.

    python tests/proof/planted_forgetting.py MODEL [--steps 60] [--texts 80] [--only KIND] [--results FILE.jsonl]

MODEL is the folder of SmolLM2-135M-Instruct. Ten clean runs learn docstrings, each from other rows, with another seed,
by one of five methods at its own rate. Ten others do so with a rate ten times too high, from one row again and again,
or from answers that are written backwards. A run has forgotten where the whole interval lies above the threshold.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from peftcli.adapters.proof import forgetting
from peftcli.recipe import load_recipe
from peftcli.train.run import train

ROWS = Path(__file__).parents[2] / "configs/quickstart/train.jsonl"
THRESHOLD = 0.05
LORA = "{type: lora, r: 16, lora_alpha: 32, target_modules: all-linear}"
CLEAN = (
    LORA,
    "{type: lora, r: 8, lora_alpha: 16, target_modules: [q_proj, v_proj]}",
    "{type: lora, r: 8, lora_alpha: 16, target_modules: [q_proj, v_proj], use_dora: true}",
    "{type: ia3}",
    "{type: oft, target_modules: [q_proj, v_proj]}",
)
RATE = 5e-4
"""That of configs/quickstart.yaml, for LoRA."""


def runs(steps: int) -> Iterator[tuple[str, int, str, float | str, list[dict[str, Any]]]]:
    """Kind, seed, method, rate and rows of each run."""
    whole = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    for seed in range(10):
        yield "clean", seed, CLEAN[seed % len(CLEAN)], "auto", _some(whole, seed, steps)
    for seed in range(4):
        yield "rate", seed, LORA, 10 * RATE, _some(whole, seed, steps)
    for seed in range(3):
        yield "narrow", seed, LORA, RATE, _some(whole, seed, steps)[:1] * 2 * steps
    for seed in range(3):
        yield "reversed", seed, LORA, RATE, [_reversed(row) for row in _some(whole, seed, steps)]


def _some(rows: list[dict[str, Any]], seed: int, steps: int) -> list[dict[str, Any]]:
    return random.Random(seed).sample(rows, min(2 * steps, len(rows)))


def _reversed(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its answer written backwards."""
    turns = [dict(turn) for turn in row["messages"]]
    turns[-1]["content"] = turns[-1]["content"][::-1]
    return {"messages": turns}


def run(model: str, folder: Path, steps: int, *given: Any) -> dict[str, Any]:
    """Train one; return the content of its run.json."""
    kind, seed, method, rate, rows = given
    data, recipe = folder / "train.jsonl", folder / "recipe.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe.write_text(
        f"""\
base_model: {model}
task: causal_lm
method: {method}
dataset: {{train: {data}, max_length: 160}}
training:
  output_dir: {folder}/{kind}-{seed}
  max_steps: {steps}
  per_device_train_batch_size: 2
  learning_rate: {rate}
  warmup_ratio: 0.05
  seed: {seed}
  save_strategy: "no"
  verify: false
  measure_forgetting: true
"""
    )
    AcceleratorState._reset_state()
    return train(load_recipe(recipe))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--texts", type=int, default=80)
    parser.add_argument("--only", default="")
    parser.add_argument("--results", type=Path)
    chosen = parser.parse_args()
    texts = forgetting.shipped_texts()[: chosen.texts]
    forgetting.shipped_texts = lambda: texts
    found: dict[str, list[bool]] = {}
    print("| run | method | rate | forgotten | 95 % interval | KL | tokens kept | found |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for given in runs(chosen.steps):
        kind, seed, method, *_ = given
        if chosen.only and not f"{kind}-{seed}".startswith(chosen.only):
            continue
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            record = run(chosen.model, Path(folder), chosen.steps, *given)
        each, rate = record["forgetting"], record["recipe"]["training"]["learning_rate"]
        has_forgotten = each["low"] > THRESHOLD
        found.setdefault(kind, []).append(has_forgotten)
        print(
            f"| {kind} {seed} | {method} | {rate:g} | {each['loss']:+.3f} | {each['low']:+.3f} to {each['high']:+.3f} "
            f"| {each['kl']:.3f} | {each['kept_tokens']:.1%} | {'yes' if has_forgotten else 'no'} |",
            flush=True,
        )
        if chosen.results:
            seconds = {"run_seconds": record["wall_seconds"], "whole_seconds": time.perf_counter() - begun}
            with chosen.results.open("a") as file:
                file.write(json.dumps({"kind": kind, "seed": seed, "method": method, **each, **seconds}) + "\n")
    for kind, those in found.items():
        print(f"{kind}: found in {sum(those)} of {len(those)}")


if __name__ == "__main__":
    main()
