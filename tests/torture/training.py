"""What campaigns on training share: a recipe that needs all of a checkpoint, its uninterrupted run, the comparison."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import trainkit
from trainkit import FULL, PRODUCT, at_step, read_run, run_recipe, write_recipe

from peftcli.errors import Interrupted

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
