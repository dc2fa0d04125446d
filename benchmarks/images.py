"""A folder of 50,000 small images: the start of a run, the memory of its steps, and steps with workers that decode.

The images and a tiny ViT are made in ``--folder`` once. Measured are CPU seconds of this process and its workers, and
wall time, which means little on a busy machine.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/images.py --folder /tmp/images start
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/images.py --folder /tmp/images memory
    .venv/bin/python benchmarks/images.py --folder /tmp/images workers
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

IMAGES, SIDE, CLASSES = 50_000, 96, 10
PHOTOS, PHOTO_SIDE, MODEL_SIDE = 200, 640, 224


def write_images(folder: Path, count: int, side: int) -> Path:
    """JPEGs of random blocks, no two alike, in a folder a class; made once."""
    import numpy as np
    from PIL import Image

    done = folder / ".done"
    if not done.exists():
        draw = np.random.default_rng(0)
        for at in range(CLASSES):
            (folder / f"class{at}").mkdir(parents=True, exist_ok=True)
        for number in range(count):
            blocks = Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8))
            blocks.resize((side, side)).save(folder / f"class{number % CLASSES}/{number:05}.jpg", quality=85)
        done.touch()
    return folder


def write_base(folder: Path, image_size: int, hidden_size: int) -> Path:
    """A ViT of two layers."""
    import transformers

    if not (folder / "config.json").exists():
        config = transformers.ViTConfig(
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=image_size // 4,
        )
        transformers.ViTForImageClassification(config).save_pretrained(folder)
        size = {"height": image_size, "width": image_size}
        transformers.ViTImageProcessor(size=size).save_pretrained(folder)
    return folder


def train(
    base: Path, rows: Path, on_event: Callable[[Any], None], task: dict[str, Any] | None = None, **training: Any
) -> None:
    """Train an adapter; of a ViT if no task is named."""
    from peftcli.schema import BaseModel, Dataset, Recipe, Training
    from peftcli.train.run import train

    with tempfile.TemporaryDirectory() as out:
        recipe = Recipe(
            base_model=BaseModel(name=str(base)),
            task=task or {"type": "image_classification"},
            method={"type": "lora", "r": 4, "target_modules": "all-linear"},
            dataset=Dataset(train=str(rows)),
            training=Training(output_dir=f"{out}/run", bf16=False, save_strategy="no", **training),
        )
        train(recipe, on_event=on_event)


def cpu_seconds() -> float:
    """CPU time of this process and of the workers that have ended."""
    return sum(os.times()[:4])


def resident_with_workers() -> int:
    """Resident memory of this process and its workers, in bytes."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in ("self", *children)) * 4096


def start(folder: Path) -> None:
    """When the first step is done: with an empty cache, then with what the first run left there."""
    images, base = write_images(folder / "images", IMAGES, SIDE), write_base(folder / "base", 32, 32)
    for which, spans in first_steps(base, images):
        names = ("data read", "model loaded and first step done")
        print(
            which,
            *(f"{name} in {wall:.1f} s ({cpu:.1f} CPU s)" for name, (wall, cpu) in zip(names, spans, strict=True)),
        )


def first_steps(base: Path, rows: Path, task: dict[str, Any] | None = None) -> Iterator[tuple[str, list[list[float]]]]:
    """Seconds and CPU seconds to read the data, and from there to the end of step 1: without, then with a cache."""
    from peftcli.train.events import Message, Stepped

    for name in ("accelerate", "transformers"):  # before the clock
        import_module(name)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["PEFTCLI_CACHE"] = cache
        for which in ("nothing cached", "cached"):
            marks = [(time.perf_counter(), cpu_seconds())]

            def note(event: Any, marks: list[tuple[float, float]] = marks) -> None:
                loads = isinstance(event, Message) and event.text.startswith("loading")
                if loads or (isinstance(event, Stepped) and event.result.step == 1):
                    marks.append((time.perf_counter(), cpu_seconds()))

            train(base, rows, note, task, max_steps=2, per_device_train_batch_size=8)
            yield which, [[end - begin for begin, end in zip(*pair, strict=True)] for pair in pairwise(marks)]


def memory(folder: Path) -> None:
    """Resident memory of this process and its workers over 400 steps."""
    from peftcli.train.events import Stepped

    images, base = write_images(folder / "images", IMAGES, SIDE), write_base(folder / "base", 32, 32)
    found = list[int]()

    def note(event: Any) -> None:
        if isinstance(event, Stepped):
            found.append(resident_with_workers())

    train(base, images, note, max_steps=400, per_device_train_batch_size=16)
    thirds = [statistics.median(found[at : at + 100]) for at in (100, 200, 300)]
    print("median of steps 101-200, 201-300, 301-400:", ", ".join(f"{each / 2**20:.1f} MiB" for each in thirds))


def workers(folder: Path, rounds: int = 2) -> None:
    """Wall time of a step on photos with 0 and with 1 worker, in turns, each in a process of its own."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(rounds):
        for number, measured in times.items():
            command = [sys.executable, __file__, "--folder", str(folder), "step", "--workers", str(number)]
            measured.append(json.loads(subprocess.check_output(command, text=True).splitlines()[-1]))
    for number, measured in times.items():
        print(f"{number} workers: {statistics.median(measured):.3f} s a step", [round(each, 3) for each in measured])


def step(folder: Path, number: int) -> None:
    """Print the median wall time of a step."""
    from peftcli.train.events import Stepped

    photos = write_images(folder / "photos", PHOTOS, PHOTO_SIDE)
    base, times = write_base(folder / "larger", MODEL_SIDE, 256), list[float]()

    def note(event: Any) -> None:
        if isinstance(event, Stepped):
            times.append(time.perf_counter())

    train(base, photos, note, max_steps=12, per_device_train_batch_size=8, dataloader_num_workers=number)
    print(statistics.median(later - earlier for earlier, later in pairwise(times[3:])))


def main() -> None:
    """Run one measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measure", choices=["start", "memory", "workers", "step"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    if options.measure == "step":
        step(options.folder, options.workers)
    else:
        {"start": start, "memory": memory, "workers": workers}[options.measure](options.folder)


if __name__ == "__main__":
    main()
