"""What the benchmarks share: cells that are measured once each, in a process of their own, and kept in a file.

A benchmark that `python benchmarks` runs is a module with a ``measure``, which measures one cell in its process, and
with ``Part`` objects, which say which cells there are, in which order, and how the page shows them.
"""

from __future__ import annotations

import functools
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORK = ROOT / "outputs/benchmarks"
"""Where rows and earlier versions stand between the cells."""
TOKENIZER = "models/SmolLM2-135M-Instruct"
MODEL = os.environ.get("BENCH_MODEL", TOKENIZER)
"""The base model that is trained; the tokenizer is always that of the first."""
BEFORE = "290fe17"
"""The commit before the work on speed."""

Cell = dict[str, Any]
"""Arguments of ``measure``."""


@dataclass(frozen=True)
class Part:
    """Some cells of a benchmark, and their section of the page."""

    script: str
    cells: Callable[[int], Iterable[Cell]]
    """Of so many rounds, in the order in which they are measured: sides take turns."""
    section: Callable[[Found], Iterator[str]]
    minutes: int
    """How long five rounds take on one core of a machine as the page's, about."""
    threads: int | None = 1
    """None: as torch and peftcli choose."""


class Found:
    """What was measured of a part."""

    def __init__(self, entries: Sequence[dict[str, Any]]):
        self.entries = entries

    def __bool__(self) -> bool:
        return bool(self.entries)

    def of(self, **cell: Any) -> dict[int, dict[str, Any]]:
        """Return round -> figures of the cells with these arguments."""
        return {
            entry["cell"].get("round", 0): entry["found"]
            for entry in self.entries
            if all(entry["cell"].get(key) == value for key, value in cell.items())
        }

    def each(self, key: str, **cell: Any) -> list[float]:
        """Return a figure in each round."""
        return [figures[key] for figures in self.of(**cell).values() if key in figures]

    def ratios(self, key: str, above: Cell, below: Cell) -> list[float]:
        """Return the ratio of a figure of two cells in each round that both have."""
        first, second = self.of(**above), self.of(**below)
        return [first[at][key] / second[at][key] for at in first if at in second and key in first[at]]


def run_cell(script: str, cell: Cell, threads: int | None) -> dict[str, Any]:
    """Measure a cell in a process of its own.

    Raises:
        subprocess.CalledProcessError: it could not be measured; what it said is on stderr.
    """
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    environment.pop("OMP_NUM_THREADS", None)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, f"benchmarks/{script}.py", json.dumps(cell)]
    output = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def answer(measure: Callable[..., dict[str, Any]]) -> None:
    """Measure the cell that is this process's argument, and print what was found as the last line."""
    print(json.dumps(measure(**json.loads(sys.argv[1]))))


@functools.cache
def machine() -> str:
    """Say what a cell was measured on."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    flags = [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if f" {name}" in text]
    packages = []
    for name in ("torch", "transformers", "accelerate", "peft", "trl"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    processor = ", ".join([*dict.fromkeys(models), *flags]) or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {processor}; Python {platform.python_version()}, {', '.join(packages)}"


@functools.cache
def commit() -> str:
    """Return the commit that is measured, with a plus sign if files of the package differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--short", "peftcli") else "")


def earlier_version() -> Path:
    """Return a folder with the package as it was before the work on speed, out of git's history."""
    folder = WORK / BEFORE
    if not folder.exists():
        archive = subprocess.run(["git", "archive", BEFORE, "peftcli", "configs"], cwd=ROOT, capture_output=True)
        if archive.returncode:
            raise SystemExit(f"no commit {BEFORE} in this checkout: git fetch --unshallow")
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="data")
    return folder


def clock() -> float:
    """Return the CPU seconds of this process; where it has a GPU the time, once that is done with its work."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak() -> float:
    """Forget the peak memory of this process, or of its GPU. Returns what is resident there, in MiB."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(key: str = "VmHWM") -> float:
    """Return the peak memory since ``reset_peak``, of a GPU where there is one, or a line of the status, in MiB."""
    torch = sys.modules.get("torch")
    if key == "VmHWM" and torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def middle(values: Sequence[float], digits: int = 2) -> str:
    """Return the median of values and, where there are several, the least and the most."""
    if not values:
        return "not measured"
    text = f"{statistics.median(values):,.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"
