"""Does every method learn with ``learning_rate: auto`` and no setting of its own? 60 steps of three tasks.

Each run is ``peftcli.train`` with the least recipe: base model, task, method, data, 60 steps. Written is the evaluation
loss before the first step and after the last one. Results are added to a file, and runs that it holds are not repeated;
``--factors`` tries multiples of the automatic rate. ``--table`` writes docs/learning_rates.md from the file alone. The
file beside this one, learning_rates.jsonl, has what was measured so far.

    make quickstart
    python configs/tasks/fetch.py minilm models/MiniLM-L6      and spam data/spam, garments data/garments
    python configs/tasks/pretrain_segformer.py data/garments models/segformer-garments
    OMP_NUM_THREADS=1 nice python benchmarks/learning_rates.py --tasks sequence_classification
    python benchmarks/learning_rates.py --table
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from peftcli.errors import Interrupted, PeftcliError
from peftcli.methods import METHODS
from peftcli.recipe.rates import usual_rate
from peftcli.schema import BaseModel, Dataset, Recipe, Training
from peftcli.train.run import train

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/learning_rates.md"
STEPS = 60
ENOUGH = 0.1
"""How far the evaluation loss must fall, as a share of what it was."""


@dataclass(frozen=True)
class Lesson:
    """One task: a base model, its data, and how much of it a step sees."""

    base: str
    told: str
    train: str
    eval: str
    batch: int
    eval_rows: int
    max_length: int = 1024
    settings: dict[str, Any] = field(default_factory=dict)
    """The task's own."""


LESSONS = {
    "causal_lm": Lesson(
        "models/SmolLM2-135M-Instruct",
        "SmolLM2-135M-Instruct; the docstrings of the quickstart as plain texts of at most 24 tokens, 4 a step",
        "configs/quickstart/train.jsonl",
        "configs/quickstart/eval.jsonl",
        batch=4,
        eval_rows=24,
        max_length=24,
    ),
    "sequence_classification": Lesson(
        "models/MiniLM-L6",
        "MiniLM-L6, 22 million parameters; the first 24 tokens of mails, some of them spam, 8 a step",
        "data/spam/train.jsonl",
        "data/spam/eval.jsonl",
        batch=8,
        eval_rows=96,
        max_length=24,
    ),
    "semantic_segmentation": Lesson(
        "models/segformer-garments",
        "a SegFormer of 0.3 million parameters, pretrained by configs/tasks/pretrain_segformer.py; garments in "
        "pictures of 64 by 64 pixels, 8 a step",
        "data/garments/train.jsonl",
        "data/garments/eval.jsonl",
        batch=8,
        eval_rows=64,
        settings={"labels": ["background", "top", "trousers", "dress", "shoe", "bag"]},
    ),
}
LEFT_OUT = {
    "xlora": "it mixes LoRA adapters that are trained already, which its `adapters` must name; a start without any has "
    "nothing to mix, so nothing to learn from",
}
"""Method -> why it is in no table."""
TOKENS = {"num_virtual_tokens": 16}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"type": name} for name in METHODS if name not in (*LEFT_OUT, "poly")},
    "lora, pissa": {"type": "lora", "init_lora_weights": "pissa_niter_4"},
    "lora, olora": {"type": "lora", "init_lora_weights": "olora"},
    "lora, eva": {"type": "lora", "init_lora_weights": "eva"},
    "lora, corda": {"type": "lora", "init_lora_weights": "corda"},
    "lora, lora_ga": {"type": "lora", "init_lora_weights": "lora_ga"},
    "lora, dora": {"type": "lora", "use_dora": True},
    "lora, rslora r 64": {"type": "lora", "use_rslora": True, "r": 64},
    "poly": {"type": "poly"},
    "prompt_tuning": {"type": "prompt_tuning", **TOKENS},
    "p_tuning": {"type": "p_tuning", **TOKENS},
    "prefix_tuning": {"type": "prefix_tuning", **TOKENS},
    "prefix_tuning, zero": {"type": "prefix_tuning", "init_weights": "zero", **TOKENS},
    "multitask_prompt_tuning": {"type": "multitask_prompt_tuning", **TOKENS},
    "trainable_tokens": {"type": "trainable_tokens", "token_indices": [1, 2]},
    "cpt": {"type": "cpt", "context": [{"prompt": "Say what it is.\n", "completion": "It is an example.\n"}]},
    "cartridge": {"type": "cartridge", **TOKENS},
    "adaption_prompt": {"type": "adaption_prompt", "adapter_len": 10, "adapter_layers": 4},
}
"""Case -> the recipe's ``method``: its type, and what it cannot do without."""
_TEXT = {"vblora": {"vector_length": 64}, "c3a": {"block_size": 64}}
SMALLER: dict[str, dict[str, dict[str, Any]]] = {
    "causal_lm": _TEXT,
    "sequence_classification": _TEXT,
    "semantic_segmentation": {
        "vblora": {"vector_length": 8},
        "fourierft": {"n_frequency": 100},
        "waveft": {"n_frequency": 100},
        "c3a": {"block_size": 8},
        "miss": {"r": 8},
        "shira": {"r": 2},
        "psoft": {"r": 8},
        "road": {"group_size": 8},
        "lora, rslora r 64": {"r": 16},
    },
}
"""Task -> case -> settings without which the case does not fit the model: the layers have 576, 384, and 24 inputs."""

WHY = {
    "tinylora": "64 numbers a layer learn slowly, at every rate that was tried",
    "pvera": "training draws each update at random",
    "adaption_prompt": "gates start at zero, and the prompts learn only once these have moved",
    "cpt": "the vectors stay within opt_projection_epsilon of where they start",
    "trainable_tokens": "two tokens train, ends of chat turns, of which a plain text has one at most",
}
"""Why a case's loss falls by less."""
WHY_NOT = {
    "frod": "layers of one name, as q_proj, share a matrix of inputs by inputs, so each must have the same number of "
    "inputs; the stages of a SegFormer differ in theirs",
}
"""Why a case fails, where its error says what is wrong and not why."""

INTRODUCTION = f"""
What `training.learning_rate: auto`, the default, means, and what each method does with it: {STEPS} steps with nothing
but the method's name and what it cannot do without. Written by `benchmarks/learning_rates.py`, which says how to run it
again; one seed each. The loss should fall by {ENOUGH:.0%} at least. The tables say that methods learn, not which is
best, and a task with a new head learns mostly by that head in so few steps. A negative fall is a rise.

`peftcli check` warns of a rate that is ten times as large as `auto`, or as small. `peftcli train` records the number.
"""


def main() -> None:
    """Run what is asked for, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--tasks", nargs="+", default=list(LESSONS), choices=LESSONS)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--factors", nargs="+", type=float, default=[1.0])
    parser.add_argument("--models", type=Path, default=ROOT / "models")
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--table", action="store_true", help="write the page")
    given = parser.parse_args()
    if given.table:
        PAGE.write_text("\n".join(page(read(given.results))) + "\n")
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for task in given.tasks:
        for factor in given.factors:
            for case in given.cases:
                measure(given, task, case, factor)


def read(path: Path) -> list[dict[str, Any]]:
    """The runs in a file of results."""
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def measure(given: argparse.Namespace, task: str, case: str, factor: float) -> None:
    """Train once, unless the file has that run, and add it to the file."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(given, task, case, Path(folder))
        rate = float(f"{factor * usual_rate(recipe):.2g}")
        key = {"task": task, "case": case, "rate": rate}
        if any(key.items() <= run.items() for run in read(given.results)):
            return
        recipe = replace(recipe, training=replace(recipe.training, learning_rate=rate))
        started = time.process_time()
        try:
            run = train(recipe)
            lines = (Path(folder) / "out/metrics.jsonl").read_text().splitlines()
            losses = [entry["eval_loss"] for entry in map(json.loads, lines) if "eval_loss" in entry]
            found: dict[str, Any] = {"before": losses[0], "after": losses[-1], **run["parameters"]}
        except Interrupted:
            raise
        except PeftcliError as error:
            found = {"error": error.message}
        seconds = round(time.process_time() - started, 1)
    with given.results.open("a") as file:
        file.write(json.dumps({**key, **found, "cpu_seconds": seconds}) + "\n")
    print(task, case, rate, found, f"{seconds} s", flush=True)


def recipe_of(given: argparse.Namespace, task: str, case: str, folder: Path) -> Recipe:
    """The least recipe."""
    lesson = LESSONS[task]
    base, data, held_out = (place(given, each) for each in (lesson.base, lesson.train, lesson.eval))
    return Recipe(
        base_model=BaseModel(name=str(base), dtype="float32"),
        task={"type": task, **lesson.settings},
        method=CASES[case] | SMALLER[task].get(case, {}),
        dataset=Dataset(
            train=str(some(data, STEPS * lesson.batch, folder / "train.jsonl")),
            eval=str(some(held_out, lesson.eval_rows, folder / "eval.jsonl")),
            max_length=lesson.max_length,
        ),
        training=Training(
            output_dir=str(folder / "out"),
            max_steps=STEPS,
            per_device_train_batch_size=lesson.batch,
            per_device_eval_batch_size=lesson.batch,
            eval_on_start=True,
            save_strategy="no",
            bf16=False,
        ),
    )


def place(given: argparse.Namespace, path: str) -> Path:
    """Where a model or data stands."""
    first, _, rest = path.partition("/")
    return getattr(given, first) / rest if first in ("models", "data") else ROOT / path


def some(source: Path, count: int, target: Path) -> Path:
    """The first rows of a file; of a conversation, the answer as a text."""
    rows = list(map(json.loads, source.read_text().splitlines()[:count]))
    for row in rows:
        if "messages" in row:
            row["text"] = row.pop("messages")[-1]["content"]
        for key in ("image", "annotation"):
            if key in row:
                row[key] = str((source.parent / row[key]).resolve())
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def page(runs: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of the page."""
    yield "# Learning rates"
    yield ""
    yield from INTRODUCTION.strip().splitlines()
    yield ""
    yield from (f"`{name}` is in no table: {why}." for name, why in LEFT_OUT.items())
    for task, lesson in LESSONS.items():
        found = [run for run in runs if run["task"] == task]
        at_auto = [run for run in found if "error" not in run and run["rate"] == auto_of(task, run["case"])]
        enough = sum(1 - run["after"] / run["before"] >= ENOUGH for run in at_auto)
        yield from ("", f"## {task}", "", f"{lesson.told[0].upper()}{lesson.told[1:]}.", "")
        yield f"At `auto` the loss fell by {ENOUGH:.0%} or more in {enough} of {len(at_auto)} runs."
        yield ""
        yield "| method | trained parameters | `auto` | eval loss | after | fall | other rates: fall |"
        yield "| --- | ---: | ---: | ---: | ---: | ---: | --- |"
        for case in CASES:
            mine = [run for run in found if run["case"] == case]
            if mine:
                yield row_of(given_task=task, case=case, runs=mine)
        little = [run["case"] for run in at_auto if 1 - run["after"] / run["before"] < ENOUGH and run["case"] in WHY]
        if little:
            yield from ("", "Why less: " + "; ".join(f"{case}: {WHY[case]}" for case in little) + ".")
        failed = [case for case in WHY_NOT if any(run["case"] == case and "error" in run for run in found)]
        if failed:
            yield from ("", "Why not: " + "; ".join(f"{case}: {WHY_NOT[case]}" for case in failed) + ".")
        missing = [case for case in CASES if not any(run["case"] == case for run in found)]
        if missing:
            yield ""
            yield f"Not measured: {'; '.join(missing)}."


def row_of(given_task: str, case: str, runs: list[dict[str, Any]]) -> str:
    """A case's row: its run at the automatic rate, and how far the loss fell at others."""
    auto = auto_of(given_task, case)
    title = case + "".join(f", {name} {value}" for name, value in SMALLER[given_task].get(case, {}).items())
    at_auto = next((run for run in runs if run["rate"] == auto), None)
    others = [f"{run['rate']:g}: {fall(run)}" for run in sorted(runs, key=itemgetter("rate")) if run is not at_auto]
    if at_auto is None or "error" in at_auto:
        told = at_auto["error"] if at_auto else "not measured"
        return f"| {title} | | {auto:g} | {told} | | | {', '.join(others)} |"
    numbers = f"{at_auto['before']:.3f} | {at_auto['after']:.3f} | {fall(at_auto)}"
    return f"| {title} | {at_auto['trainable']:,} | {auto:g} | {numbers} | {', '.join(others)} |"


def auto_of(task: str, case: str) -> float:
    """What ``auto`` means for a case."""
    dataset, training = Dataset(train=""), Training(output_dir="")
    found = usual_rate(
        Recipe(
            base_model=BaseModel(name=""), task={"type": task}, method=CASES[case], dataset=dataset, training=training
        )
    )
    return float(f"{found:.2g}")


def fall(run: dict[str, Any]) -> str:
    """By how much the loss fell; a run that did not end says why."""
    return run["error"] if "error" in run else f"{100 * (1 - run['after'] / run['before']):.0f} %"


if __name__ == "__main__":
    main()
