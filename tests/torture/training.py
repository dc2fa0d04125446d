"""What campaigns on training share: a recipe that needs all of a checkpoint, its uninterrupted run, the comparison."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import trainkit
from trainkit import read_run, run_recipe, write_recipe

from peftcli.errors import Interrupted
from peftcli.train.report import Event, Stepped

FULL = (
    "method.lora_dropout=0.2",
    "training.per_device_train_batch_size=2",
    "training.gradient_accumulation_steps=2",
    "training.eval_strategy=steps",
    "training.eval_steps=2",
    "training.eval_on_start=true",
    "training.save_strategy=steps",
    "training.save_steps=3",
    "training.load_best_model_at_end=true",
    "training.logging_steps=2",
    "training.warmup_steps=2",
)
"""All that a checkpoint must carry: dropout, accumulation, best adapter, schedule, the loss since the last line."""
PRODUCT = ("adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "loss.png")
_AGREE = ("status", "exit_code", "error", "steps", "train_loss", "eval", "parameters")


@functools.cache
def whole() -> Path:
    """The folder of the uninterrupted run."""
    return run_recipe(write_recipe(trainkit.scratch() / "whole"), *FULL).folder


@functools.cache
def stopped() -> Path:
    """A folder with a recipe, its data, and its run that was stopped after step 7: checkpoints of steps 6 and 7."""
    folder = trainkit.scratch() / "stopped"
    try:
        run_recipe(write_recipe(folder), *FULL, on_event=at_step(7, _stop))
    except Interrupted:
        return folder
    raise AssertionError("it was not stopped")


def stopped_copy(folder: Path) -> Path:
    """A copy of the stopped run; gives its recipe. It reads the data of the first, as its run.json says."""
    shutil.copytree(stopped() / "out", folder / "out")
    recipe = folder / "recipe.yaml"
    recipe.write_text((stopped() / "recipe.yaml").read_text().replace(f"{stopped()}/out", f"{folder}/out"))
    return recipe


def _stop() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGTERM)


def at_step(step: int, action: Callable[[], None]) -> Callable[[Event], None]:
    """A listener that acts once ``step`` is done."""

    def on_event(event: Event) -> None:
        if isinstance(event, Stepped) and event.result.step == step:
            action()

    return on_event


def assert_same(folder: Path, expected: Path) -> None:
    """The run in ``folder`` ended as the uninterrupted one did, byte for byte."""
    for name in PRODUCT:
        assert (folder / name).is_file(), f"{name} is missing"
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), f"{name} differs"
    run, other = read_run(folder), read_run(expected)
    for key in _AGREE:
        assert run[key] == other[key], f"run.json: {key} is {json.dumps(run[key])}, not {json.dumps(other[key])}"
    left = [path.name for path in folder.rglob(".*") if path.name.endswith(".tmp") or path.name.startswith(".old-")]
    assert not left, f"left behind: {left}"
