"""Measure what one reads to understand LoRA on a linear layer, one training step, and one task.

A reading path is the functions of the package that run, by their source lines, and the files that hold them. Left out
are ``errors``, ``guard``, ``system``, and the files that compute the same in less time, whose plain path stands beside.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peftcli"
FASTER = ("methods/lora/fused.py", "tasks/text/fast/")
LEFT_OUT = ("errors.py", "guard/", "system/", *FASTER)

Followed = dict[str, set[CodeType]]


@contextlib.contextmanager
def followed(path: Followed, below: str = "") -> Iterator[None]:
    """Collect the functions of the package that run, of all threads, in files below the folder ``below``."""

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)) and not code.co_name.startswith("<"):
            file = Path(code.co_filename).relative_to(PACKAGE).as_posix()
            if file.startswith(below) and not file.startswith(LEFT_OUT):
                path.setdefault(file, set()).add(code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def lora_on_a_linear_layer() -> Followed:
    """Wrap a linear layer, call it, and compute its merged weight."""
    import torch

    from peftcli.core.targets import wrap
    from peftcli.methods.lora import LoraConfig, layers  # noqa: F401

    path: Followed = {}
    base, config = torch.nn.Linear(8, 6), LoraConfig(r=4, target_modules=["q"])
    with followed(path):
        layer: Any = wrap(base, "q", config)
        layer(torch.ones(2, 8)).sum().backward()
        layer.merged_tensors({"weight": base.weight})
    return path


def one_training_step() -> Followed:
    """Take the second step of a run of causal_lm."""
    from trainkit import run_recipe, write_recipe

    from peftcli.train import training_loop

    path: Followed = {}

    def fit(gradients: Any) -> Iterator[Any]:
        steps = plain(gradients)
        yield next(steps)
        with followed(path):
            second = next(steps)
        yield second
        yield from steps

    plain = training_loop.fit
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(training_loop, "fit", fit):
        run_recipe(write_recipe(Path(folder)))
    return path


def one_task() -> Followed:
    """Train and evaluate a sequence classifier; of its files, those of tasks."""
    from classifierkit import write_classifier_recipe
    from trainkit import run_recipe

    path: Followed = {}
    with tempfile.TemporaryDirectory() as folder, followed(path, "tasks/"):
        run_recipe(write_classifier_recipe(Path(folder)))
    return path


PATHS: dict[str, Callable[[], Followed]] = {
    "LoRA on a linear layer": lora_on_a_linear_layer,
    "one training step of causal_lm": one_training_step,
    "the task sequence_classification": one_task,
}


def lines_of(path: Followed) -> dict[str, int]:
    """Return file -> lines of its functions that run."""
    return {file: sum(len(inspect.getsourcelines(code)[0]) for code in codes) for file, codes in sorted(path.items())}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        found = {name: lines_of(run()) for name, run in PATHS.items()}
    print(json.dumps(found))
