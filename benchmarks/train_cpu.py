"""CPU time of a training step: peftcli against peft + transformers.Trainer, on the quickstart's model and data.

Both sides run one thread, alternate in processes of their own, and see the same batches of the same token ids in the
same order; the first step's loss must agree. Measured is the process's CPU time from the end of the second step to the
end of the last, over the tokens that are no padding. Needs ``make quickstart`` to have fetched the model.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/train_cpu.py --rounds 5
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

MODEL = "models/SmolLM2-135M-Instruct"
STEPS, BATCH, LEARNING_RATE = 5, 4, 2e-4
METHOD = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def recipe(folder: str) -> Any:
    """The recipe that both sides follow."""
    from peftcli.schema import BaseModel, Dataset, Recipe, Training

    return Recipe(
        base_model=BaseModel(name=MODEL, dtype="float32"),
        task="causal_lm",
        method={"type": "lora", **METHOD},
        dataset=Dataset(train="configs/quickstart/train.jsonl", max_length=512),
        training=Training(
            output_dir=f"{folder}/run",
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            train_sampling_strategy="sequential",
            save_strategy="no",
            eval_strategy="no",
            bf16=False,
            logging_steps=1,
        ),
    )


def run_ours(folder: str) -> dict[str, Any]:
    """Train through peftcli's own loop."""
    from peftcli.train.report import Stepped
    from peftcli.train.run import train

    times: list[float] = []
    losses: list[float] = []
    tokens: list[int] = []

    def note(event: object) -> None:
        if isinstance(event, Stepped):
            times.append(time.process_time())
            losses.append(event.result.loss)
            tokens.append(event.result.num_tokens)

    train(recipe(folder), on_event=note)
    return {"times": times, "losses": losses, "tokens": tokens}


def run_trainer(folder: str) -> dict[str, Any]:
    """Train a peft model through transformers.Trainer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

    from peftcli.models.open import open_base
    from peftcli.tasks import open_task
    from peftcli.train.data import load_data

    settings = recipe(folder)
    task = open_task(settings, open_base(settings.base_model))
    rows = load_data(settings, task).train
    times: list[float] = []
    losses: list[float] = []

    class Note(TrainerCallback):
        """Notes the time of each step."""

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.process_time())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    set_seed(42)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **METHOD))
    arguments = TrainingArguments(
        output_dir=f"{folder}/trainer",
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        logging_steps=1,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=lambda batch: task.collate(batch, training=True),
        callbacks=[Note()],
    ).train()
    tokens = [sum(row.size for row in rows[start : start + BATCH]) for start in range(0, STEPS * BATCH, BATCH)]
    return {"times": times, "losses": losses, "tokens": tokens}


SIDES = {"peftcli": run_ours, "peft + Trainer": run_trainer}


def measure(side: str) -> None:
    """Run one side in this process and print what it took, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        found = SIDES[side](folder)
    spent = found["times"][-1] - found["times"][1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    per_thousand = spent / sum(found["tokens"][2:]) * 1000
    result = {
        "first_loss": found["losses"][0],
        "per_thousand": per_thousand,
        "first_step": found["times"][0],
        "peak": peak,
    }
    print("RESULT " + json.dumps(result))


def main() -> None:
    """Alternate the sides and print the medians as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=SIDES)
    arguments = parser.parse_args()
    if arguments.side:
        measure(arguments.side)
        return
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(arguments.rounds):
        for side in SIDES:
            output = subprocess.run(
                [sys.executable, "-W", "ignore", __file__, "--side", side], check=True, capture_output=True, text=True
            ).stdout
            line = next(line for line in output.splitlines() if line.startswith("RESULT "))
            results[side].append(json.loads(line.removeprefix("RESULT ")))
            print(f"round {number + 1}, {side}: {line}", file=sys.stderr, flush=True)
    first = [entry["first_loss"] for entries in results.values() for entry in entries]
    if max(first) - min(first) > 1e-3:
        raise SystemExit(f"the sides do not compute the same loss: {first}")
    keys = {
        "per_thousand": "CPU s per 1,000 tokens",
        "first_step": "CPU s to the end of step 1",
        "peak": "peak RSS MiB",
    }
    medians = {
        side: {key: statistics.median(e[key] for e in entries) for key in keys} for side, entries in results.items()
    }
    print("| | " + " | ".join(keys.values()) + " |\n|---|" + "---|" * len(keys))
    for side, values in medians.items():
        print(f"| {side} | " + " | ".join(f"{values[key]:.1f}" for key in keys) + " |")
    ours, theirs = (medians[side] for side in SIDES)
    print("| ratio | " + " | ".join(f"{theirs[key] / ours[key]:.2f}" for key in keys) + " |")
    print(
        f"{Path(__file__).name}: {arguments.rounds} rounds, batch {BATCH}, {STEPS} steps, fp32, one thread",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
