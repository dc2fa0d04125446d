"""What a run tells: events while it goes, run.json, the loss curve."""

from __future__ import annotations

import io
import platform
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from peftcli.system.disk import write_file
from peftcli.train.loop import StepResult


@dataclass(frozen=True)
class Phase:
    """Work that takes a while begins."""

    text: str


@dataclass(frozen=True)
class RowsRead:
    """Rows of a dataset were encoded."""

    source: str
    count: int
    """So many so far."""
    done: bool


@dataclass(frozen=True)
class Ready:
    """Training begins."""

    run: dict[str, Any]
    """run.json so far."""
    start_step: int
    total_steps: int


@dataclass(frozen=True)
class Stepped:
    """One step was done."""

    result: StepResult
    epoch: float
    logged: bool
    """Whether it is one of the steps that metrics.jsonl holds."""
    mean_loss: float
    """Mean loss since the last logged step."""


@dataclass(frozen=True)
class Evaluated:
    """The evaluation data was gone through."""

    step: int
    metrics: dict[str, float]
    best: bool


@dataclass(frozen=True)
class Saved:
    """A checkpoint stands."""

    path: Path


@dataclass(frozen=True)
class Warned:
    """Something that the user should know and that stops nothing."""

    text: str


Event = Phase | RowsRead | Ready | Stepped | Evaluated | Saved | Warned
OnEvent = Callable[[Event], None]

PACKAGES = ("peftcli", "torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def peak_memory_bytes() -> dict[str, int]:
    """The most memory that this process has held: resident, and on the GPU if there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def draw_losses(metrics: list[dict[str, Any]], path: Path) -> None:
    """The loss curve as a PNG: training loss over the steps, evaluation loss where there is one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(entry["step"], entry[key]) for entry in metrics if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="step", ylabel="loss per target")
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image, metadata={"Software": None})
    write_file(path, image.getvalue())
