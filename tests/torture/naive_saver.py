"""The harness's negative control: a trainer that saves in place and believes what it finds.

It writes each file of its checkpoint straight to its final name, over the one before: no temporary file, no rename, no
manifest. The kills that peftcli must survive must break it; if they do not, they break nothing.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import kills
import safetensors.torch
import strace
import torch
from campaigns import Trial, results
from kills import Program
from torch import nn
from trainkit import Child

_STEPS = 60
_RANDOM_KILLS = 30
_WEIGHTS, _OPTIMIZER, _RANDOM, _PROGRESS, _METRICS = (
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "random-00000.safetensors",
    "progress.json",
    "metrics.jsonl",
)


def train(out: Path) -> None:
    """Train from the last step that the folder tells of, and save after every step."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 48), nn.Dropout(0.2), nn.Linear(48, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = _load(out, model, optimizer) if (out / _PROGRESS).exists() else 0
    while step < _STEPS:
        rows = torch.rand(64, 48, generator=torch.Generator().manual_seed(step))
        loss = (model(rows) - rows.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        with (out / _METRICS).open("a") as file:
            file.write(json.dumps({"step": step, "loss": loss.item()}) + "\n")
        _save(out, model, optimizer, step)


def _save(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    averages = {
        f"{number}.{key}": value
        for number, parameter in enumerate(model.parameters())
        for key, value in optimizer.state[parameter].items()
    }
    # not save_file, which since safetensors 0.8 writes beside and renames
    (out / _WEIGHTS).write_bytes(safetensors.torch.save(model.state_dict()))
    (out / _OPTIMIZER).write_bytes(safetensors.torch.save(averages))
    (out / _RANDOM).write_bytes(safetensors.torch.save({"cpu": torch.get_rng_state()}))
    (out / _PROGRESS).write_text(json.dumps({"step": step}))


def _load(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    model.load_state_dict(safetensors.torch.load_file(out / _WEIGHTS))
    averages = safetensors.torch.load_file(out / _OPTIMIZER)
    for number, parameter in enumerate(model.parameters()):
        optimizer.state[parameter] = {key: averages[f"{number}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    torch.set_rng_state(safetensors.torch.load_file(out / _RANDOM)["cpu"])
    step = int(json.loads((out / _PROGRESS).read_text())["step"])
    logged = (out / _METRICS).read_text().splitlines(keepends=True)
    (out / _METRICS).write_text("".join(logged[:step]))
    return step


# --- under the kills of peftcli ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Instead:
    """Trains naively in a child that was made for peftcli."""

    out: Path
    before: Callable[[], None] | None

    def __call__(self) -> None:
        if self.before is not None:
            self.before()
        train(self.out)
        os._exit(0)


def _start(folder: Path, before: Callable[[], None] | None) -> Child:
    return Child(folder, before=_Instead(folder / "out", before))


def _differences(folder: Path, whole: Path) -> list[str]:
    names = (_WEIGHTS, _METRICS)
    return [
        f"{name} has other bytes"
        for name in names
        if (folder / "out" / name).read_bytes() != (whole / "out" / name).read_bytes()
    ]


NAIVE = Program("a naive saver", _start, _differences)


def naive_trials() -> Sequence[Trial]:
    """SIGKILL at random times, and at each call of two saves."""
    found = kills.points(NAIVE)
    calls = (len(found) - 1) // _STEPS  # of each save; the first call of all makes the folder
    at_random = functools.partial(kills.kill_at_random, NAIVE, seeds=_RANDOM_KILLS)
    return [
        *(Trial(f"seed {seed}", functools.partial(at_random, seed)) for seed in range(_RANDOM_KILLS)),
        *(Trial(point.name, functools.partial(_kill_at, point)) for point in found[1 + 2 * calls : 1 + 4 * calls]),
    ]


def _kill_at(point: strace.Point, folder: Path) -> None:
    try:
        kills.kill_at(NAIVE, point, folder)
    except strace.DidNotHappen as error:
        raise RuntimeError(str(error)) from error  # no failure of the saver


def naive_failures(trials: Sequence[Trial] | None = None) -> dict[str, int]:
    """How many of the trials the naive saver did not survive."""
    outcomes = [result.failure is not None for result in results(naive_trials() if trials is None else trials)]
    return {"trials": len(outcomes), "failed": sum(outcomes)}
