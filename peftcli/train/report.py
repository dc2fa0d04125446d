"""What run.json records of versions and memory, and the loss curve."""

from __future__ import annotations

import functools
import io
import logging
import platform
from importlib.metadata import version
from typing import Any

import torch

from peftcli.system.memory import peak_resident_memory

PACKAGES = ("peftcli", "torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


_version = functools.cache(version)  # which reads a file each time


def peak_memory_bytes() -> dict[str, int]:
    """The peak memory of this process: resident, and on the GPU if there is one."""
    peak = {"rss": peak_resident_memory()}
    if torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def loss_curve(metrics: list[dict[str, Any]]) -> bytes:
    """Draw training loss over the steps, and evaluation loss where there is one. Returns the PNG."""
    # where matplotlib cannot write a cache into the home folder, it warns, and writes a temporary one
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.add_axes((0.1, 0.12, 0.87, 0.85))  # left, bottom, width, height
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(entry["step"], entry[key]) for entry in metrics if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="step", ylabel="loss per target")
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image, metadata={"Software": None})
    return image.getvalue()
