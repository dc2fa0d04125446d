"""CPU time from the start of the process to the first step: ``peftcli train`` against peft + Trainer; and of checks.

Both sides fine-tune the quickstart's model on the quickstart's rows, in processes of their own that take turns. The
peer is a script as users write it, with the chat template applied to 240 rows; peftcli has their tokens in its cache
from the first round, which does not count. Measured is the process's CPU time as training begins, and at the end of
its first step; of ``peftcli check --deep`` of the same recipe, that of the whole process. Needs ``make quickstart`` to
have fetched the model.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/start.py --runs 5
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL, RECIPE, ROWS = "models/SmolLM2-135M-Instruct", "configs/quickstart.yaml", "configs/quickstart"
BATCH, STEPS = 4, 50


def tell(**times: float) -> None:
    """Print the times and end the process, whatever it has left to do."""
    print("RESULT " + json.dumps(times), flush=True)
    os._exit(0)


def run_ours(folder: str) -> None:
    """Start the command as a shell does, and stop it after its first step."""
    from peftcli.cli.app import main
    from peftcli.cli.progress import Progress

    times: list[float] = []

    def show(self: Progress, event: Any) -> None:
        if type(event).__name__ == "Ready":
            times.append(time.process_time())
        elif type(event).__name__ == "Stepped":
            tell(ready=times[0], step=time.process_time())

    Progress.show = show  # type: ignore[method-assign]
    os.environ["QUICKSTART_MODEL"] = MODEL
    sys.argv = ["peftcli", "train", RECIPE]
    main(["train", RECIPE, f"training.output_dir={folder}/run", "training.eval_on_start=false"])


def run_trainer(folder: str) -> None:
    """Train a peft model through transformers.Trainer, and stop after the first step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    class Note(TrainerCallback):
        """Notes when training begins, and when the first step is done."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.process_time())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            tell(ready=times[0], step=time.process_time())

    times: list[float] = []
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def read(part: str) -> list[dict[str, list[int]]]:
        found = []
        for line in (Path(ROWS) / f"{part}.jsonl").read_text(encoding="utf-8").splitlines():
            messages = json.loads(line)["messages"]
            ids = tokenizer.apply_chat_template(messages)["input_ids"]
            asked = len(tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"])
            found.append({"input_ids": ids, "labels": [-100] * asked + ids[asked:]})
        return found

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": tokenizer.pad_token_id, "labels": -100}
        batch = {
            key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])
            for key, value in fill.items()
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return batch | {"attention_mask": (torch.arange(longest)[None] < lengths[:, None]).long()}

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    arguments = TrainingArguments(
        output_dir=f"{folder}/trainer",
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=5e-4,
        report_to="none",
        use_cpu=True,
        bf16=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=read("train"),
        eval_dataset=read("eval"),
        data_collator=collate,
        callbacks=[Note()],
    ).train()


def check() -> float:
    """Return the CPU seconds of a deep check."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "peftcli", "check", RECIPE, "--deep"]
    subprocess.run(command, env={**os.environ, "QUICKSTART_MODEL": MODEL}, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


SIDES = {"peftcli": run_ours, "peft + Trainer": run_trainer}


def main() -> None:
    """Alternate the sides and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--side", choices=SIDES)
    arguments = parser.parse_args()
    if arguments.side:
        with tempfile.TemporaryDirectory() as folder:
            SIDES[arguments.side](folder)
        return
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    checks = []
    for number in range(arguments.runs + 1):
        for side in SIDES:
            ran = subprocess.run(
                [sys.executable, "-W", "ignore", __file__, "--side", side], check=True, capture_output=True, text=True
            )
            line = next(line for line in ran.stdout.splitlines() if line.startswith("RESULT "))
            if number:  # the first fills caches
                results[side].append(json.loads(line.removeprefix("RESULT ")))
            print(f"round {number}, {side}: {line}", file=sys.stderr, flush=True)
        checks.append(check())
    print("| CPU s, median (least) | training begins | first step done |\n| --- | --- | --- |")
    for side, entries in results.items():
        cells = [[entry[key] for entry in entries] for key in ("ready", "step")]
        print(f"| {side} | " + " | ".join(f"{statistics.median(each):.2f} ({min(each):.2f})" for each in cells) + " |")
    ours, theirs = ([entry["ready"] for entry in entries] for entries in results.values())
    print(f"\nCPU s of check --deep: {checks[0]:.2f} at first, then {statistics.median(checks[1:]):.2f}")
    print(
        json.dumps(
            {
                "start to ready against Trainer": statistics.median(theirs) / statistics.median(ours),
                "check --deep on cached data, CPU s": statistics.median(checks[1:]),
            }
        )
    )


if __name__ == "__main__":
    main()
