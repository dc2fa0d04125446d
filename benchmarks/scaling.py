"""How cost grows: a training step with the sequence's length, batch, r, adapted modules and adapters; data with rows.

A step is forward, backward and AdamW's update of SmolLM2-135M-Instruct in bfloat16 under autocast, LoRA on all linear
layers, r 16, one row of 256 tokens, unless it says otherwise. Data are the quickstart's chats again and again, each
with a number of its own, so that nearly all are near duplicates: the most that the audit can have to compare.

Fitted is y = fixed + factor * x^exponent; beside it stands the exponent from the two largest x alone, fixed part and
all.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/scaling.py '{"of": "tokens", "x": 512}'
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from common import MODEL, Cell, Found, Part, answer, reset_peak, resident
from rows import SOURCE, rows

STEPS, ROUNDS = 6, 3
"""Steps of a cell, of which the first is not counted; repetitions."""
_QKV = ["q_proj", "k_proj", "v_proj"]
MODULES = {30: _QKV[:1], 60: _QKV[:2], 120: [*_QKV, "o_proj"], 210: "all-linear"}
"""Number of adapted modules in 30 layers -> target_modules."""
STEP_SWEEPS: dict[str, tuple[str, tuple[int, ...], str, str]] = {
    "tokens": (
        "tokens of a row",
        (128, 256, 512, 1024, 2048),
        "every layer works token by token: linear; attention's scores grow with the square, a small part up to 2,048",
        "kept activations are linear: attention keeps no scores",
    ),
    "batch": (
        "rows of a batch, 128 tokens each",
        (1, 2, 4, 8, 16),
        "the same products with more rows: linear; what a step costs whatever its size, dispatch and AdamW, is fixed",
        "kept activations are linear",
    ),
    "r": (
        "r",
        (4, 16, 64, 256),
        "linear in r where LoRA's products take long; below r 64 they cost what any small operation does: so over 1",
        "A, B, their gradients and AdamW's two moments are linear in r; activations inside an adapter are, too",
    ),
    "modules": (
        "adapted modules",
        tuple(MODULES),
        "an adapter's products each; the last 90 are the MLP's, whose sides are three times as wide: so over 1",
        "an adapter's parameters and the input that it keeps, of which those of the MLP are the largest",
    ),
    "adapters": (
        "adapters on the same modules, all enabled",
        (1, 2, 4, 8),
        "each adds its products to the same base",
        "each keeps parameters, moments and what its backward pass needs",
    ),
}
"""Sweep -> title, values of x, and the reasons why time and memory grow so."""
DATA_SWEEPS = {
    "first": (
        "start of a run, nothing cached: CPU s to the first step",
        "each row is read, checked and tokenized once",
    ),
    "cached": (
        "start of a run, data cached: CPU s to the first step",
        "files are hashed and records of rows looked through; tokens stay on disk",
    ),
    "audit": ("`peftcli inspect`: CPU s", "sketches of near duplicates are compared within bands, not in pairs"),
    "cache": ("the cache on disk, MiB", "tokens, labels and a record for each row"),
    "peak": ("peak RSS of the first start, MiB", "rows pass through in pieces; a record for each stays"),
    "audit_peak": ("peak RSS of `peftcli inspect`, MiB", "a record and a sketch for each row"),
}
"""Figure -> title, and the reason."""
ROWS = (100, 1_000, 10_000, 100_000, 1_000_000)


def measure(of: str, x: int, round: int = 0) -> dict[str, float]:
    """Measure one point of a sweep."""
    if of == "rows":
        return data(x)
    given: dict[str, Any] = {"tokens": 256, "batch": 1, "r": 16, "modules": 210, "adapters": 1}
    if of == "batch":
        given["tokens"] = 128
    return step(**{**given, of: x})


def step(tokens: int, batch: int, r: int, modules: int, adapters: int) -> dict[str, float]:
    """Return CPU seconds of a training step, and what it takes of memory beyond the loaded model, in MiB."""
    import torch
    from transformers import AutoModelForCausalLM

    from peftcli.core.inject import inject
    from peftcli.methods.lora import LoraConfig
    from peftcli.tasks.text.language_model import target_losses
    from peftcli.tasks.text.token_ids import next_tokens

    chosen = rows("long", 0, 25)
    ids = torch.tensor([row["input_ids"][:tokens] for row in chosen[:batch]])
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).train()
    before = reset_peak()
    for number in range(adapters):
        inject(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=MODULES[modules]), f"adapter{number}")
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    seconds = []
    for _ in range(STEPS):
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            losses, _ = target_losses(
                model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, next_tokens(ids)
            )
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    return {
        "seconds": median(seconds[1:]),
        "growth": resident() - before,
        "trained": sum(each.numel() for each in parameters),
    }


def data(count: int) -> dict[str, float]:
    """Return what the data of so many rows cost: at a run's start, in the audit, on disk."""
    with tempfile.TemporaryDirectory() as folder:
        source = [json.loads(line) for line in SOURCE.read_text(encoding="utf-8").splitlines()]
        with Path(folder, "train.jsonl").open("w", encoding="utf-8") as file:
            for number in range(count):
                question, answer = (turn["content"] for turn in source[number % len(source)]["messages"])
                asked = {"role": "user", "content": f"Function {number}. {question}"}
                file.write(json.dumps({"messages": [asked, {"role": "assistant", "content": answer}]}) + "\n")
        recipe = {
            "base_model": MODEL,
            "task": "causal_lm",
            "method": {"type": "lora"},
            "dataset": {"train": f"{folder}/train.jsonl", "max_length": 512},
            "training": {"output_dir": f"{folder}/run", "max_steps": 1, "per_device_train_batch_size": 1},
        }
        path = Path(folder, "recipe.yaml")
        path.write_text(json.dumps(recipe))
        cache = Path(folder, "cache")
        first, cached = (_spent(cache, __file__, str(path)) for _ in range(2))
        audit = _spent(cache, "-m", "peftcli", "inspect", str(path), "--rows", "3", "--json", "--quiet")
        size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) / 2**20
    return {
        "first": first[0],
        "cached": cached[0],
        "audit": audit[0],
        "cache": size,
        "peak": first[1],
        "audit_peak": audit[1],
    }


def _spent(cache: Path, *command: str) -> tuple[float, float]:
    """CPU seconds and peak memory, in MiB, of a process with this cache."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, env={**os.environ, "PEFTCLI_CACHE": str(cache)}
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def start(path: str) -> None:
    """Start a run, and end this process when its first step would begin."""
    from peftcli.recipe import load_recipe
    from peftcli.train.events import Ready
    from peftcli.train.run import train

    def note(event: object) -> None:
        if isinstance(event, Ready):
            os._exit(0)

    train(load_recipe(Path(path)), on_event=note)


def cells(rounds: int) -> Iterator[Cell]:
    """Each point once a round; data once, in one row of sizes."""
    for x in ROWS:
        yield {"of": "rows", "x": x}
    for round in range(min(rounds, ROUNDS)):
        for of, (_, values, *_) in STEP_SWEEPS.items():
            yield from ({"of": of, "x": x, "round": round} for x in values)


def section(found: Found) -> Iterator[str]:
    """A line for each sweep."""
    yield "## How cost grows"
    yield from ("", *(__doc__ or "").partition("\n\n")[2].rpartition("\n\n    ")[0].splitlines(), "")
    yield "| x | figure | from x to x | from y to y | exponent | of the two largest | fixed part | why |"
    yield "| --- | --- | --- | --- | ---: | ---: | ---: | --- |"
    for of, (title, values, *reasons) in STEP_SWEEPS.items():
        for (key, name), reason in zip({"seconds": "CPU s a step", "growth": "MiB"}.items(), reasons, strict=True):
            points = [(x, median(each)) for x in values if (each := found.each(key, of=of, x=x))]
            yield from _line(title, name, points, reason)
    sizes = sorted({entry["cell"]["x"] for entry in found.entries if entry["cell"]["of"] == "rows"})
    for key, (name, reason) in DATA_SWEEPS.items():
        yield from _line("rows", name, [(x, found.each(key, of="rows", x=x)[0]) for x in sizes], reason)


def _line(title: str, name: str, points: list[tuple[int, float]], reason: str) -> Iterator[str]:
    if len(points) < 3:
        return
    (first, low), (before, near), (last, high) = points[0], points[-2], points[-1]
    fixed, exponent = fit(points)
    local = math.log(high / near) / math.log(last / before)
    ends = f"{first:,} to {last:,} | {low:,.2f} to {high:,.2f}"
    yield f"| {title} | {name} | {ends} | {exponent:.2f} | {local:.2f} | {fixed:,.2f} | {reason} |"


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the fixed part and the exponent of ``y = fixed + factor * x^exponent`` with the least relative error."""
    import numpy as np

    x, y = np.array(points, float).T
    best = (math.inf, 0.0, 0.0)
    for exponent in np.arange(0.05, 3, 0.01):
        powers = (x / x[-1]) ** exponent
        for columns in ([np.ones_like(x), powers], [powers]):
            factors, *_ = np.linalg.lstsq(np.stack(columns, 1) / y[:, None], np.ones_like(x), rcond=None)
            off = float(np.square(np.stack(columns, 1) @ factors / y - 1).sum())
            if min(factors) >= 0 and off < best[0]:
                best = (off, float(factors[0]) if len(factors) == 2 else 0.0, float(exponent))
    return best[1:]


PARTS = {"scaling": Part("scaling", cells, section, 35)}

if __name__ == "__main__":
    if sys.argv[1].startswith("{"):
        answer(measure)
    else:
        start(sys.argv[1])
