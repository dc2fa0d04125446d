"""Numbers that are not finite, and memory that does not suffice."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import trainkit
from campaigns import Campaign, Trial
from training import assert_same, whole
from trainkit import FULL, Child, read_metrics, read_run, write_recipe

from peftcli.train.runs.checkpoint import find_damage


def _failed(child: Child, out: Path, code: int, words: str) -> None:
    """The child failed as it should: one message, no product, whole checkpoints, an account."""
    found = child.wait()
    assert found == code, f"exit code {found}, not {code}: {child.err[-700:]}"
    assert "Traceback" not in child.err, child.err
    assert child.err.count("error:") == 1, child.err
    assert words in child.err, child.err[-500:]
    assert not (out / "adapter_model.safetensors").exists(), "an adapter was written"
    for path in out.glob("checkpoints/step-*"):
        assert find_damage(path) is None, f"{path.name}: {find_damage(path)}"
        for name, value in safetensors.torch.load_file(path / "adapter_model.safetensors").items():
            assert bool(torch.isfinite(value).all()), f"{path.name}: {name} is not finite"


@dataclass(frozen=True)
class _Poison:
    """Makes what a step computes not finite: the loss, or a gradient."""

    step: int
    value: float
    what: str

    def __call__(self) -> None:
        from accelerate import Accelerator

        from peftcli.train.plan import Plan

        global_batch, backward = Plan.global_batch, Accelerator.backward
        now = [0]

        def watched(plan: Plan, step: int) -> list[int]:
            now[0] = step + 1
            return global_batch(plan, step)

        def poisoned(accelerator: Accelerator, loss: torch.Tensor) -> None:
            backward(accelerator, loss * self.value if now[0] == self.step else loss)

        Plan.global_batch = watched
        if self.what == "gradient":
            Accelerator.backward = poisoned
        else:
            import peftcli.train.loop as loop

            inner = loop.Gradients.loss
            loop.Gradients.loss = lambda *args: inner(*args) * (self.value if now[0] == self.step else 1.0)


def _poisoned(poison: _Poison, folder: Path) -> None:
    """Training stops at that step; once the reason is gone the same command goes on from before."""
    recipe, out = write_recipe(folder), folder / "out"
    child = Child(folder, "train", recipe, *FULL, before=poison)
    _failed(child, out, 9, f"of step {poison.step} is not finite")
    run = read_run(out)
    assert (run["status"], run["exit_code"], run["error"]["kind"]) == ("failed", 9, "Diverged")
    assert all(entry["step"] < poison.step for entry in read_metrics(out))
    again = Child(folder, "train", recipe, *FULL)
    assert again.wait() == 0, again.err
    assert_same(out, whole())


def _bad_base(value: float, folder: Path) -> None:
    """A base model whose weights are not finite."""
    base = shutil.copytree(trainkit.base_folder(), folder / "base")
    path = base / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    recipe, out = write_recipe(folder, base), folder / "out"
    _failed(Child(folder, "train", recipe, *FULL), out, 9, "not finite")


@dataclass(frozen=True)
class _Memory:
    """Leaves the process so many more MiB from a certain moment on."""

    room: int
    module: str
    place: str

    def __call__(self) -> None:
        import importlib

        module = importlib.import_module(self.module)
        inner = getattr(module, self.place)

        def limited(*args: object, **settings: object) -> object:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + self.room * 2**20, resource.RLIM_INFINITY))
            return inner(*args, **settings)

        setattr(module, self.place, limited)


def _hungry(module: str, place: str, room: int, folder: Path) -> None:
    """Rows that take more memory than there is: exit code 8, and with memory the same command ends."""
    rows = [
        {"messages": [{**question, "content": f"{number}: {question['content']}"}, {**answer, "content": text}]}
        for number in range(20)
        for question, answer in (row["messages"] for row in trainkit.MESSAGES)
        for text in [answer["content"] * 40]
    ]
    recipe, out = write_recipe(folder, rows=rows), folder / "out"
    trainkit.write_rows(folder / "train.jsonl", rows)
    settings = ("dataset.max_length=256", "training.per_device_train_batch_size=200", "dataset.allow=[answers_cut]")
    eager = "base_model.attn_implementation=eager"  # with padding, so that all rows are in the model at once
    settings = (*settings, "training.max_steps=1", eager)
    child = Child(folder, "train", recipe, *settings, before=_Memory(room, module, place))
    _failed(child, out, 8, "not enough memory")
    assert "per_device_train_batch_size" in child.err, "it does not say what to do"
    assert read_run(out)["exit_code"] == 8
    again = Child(folder, "train", recipe, *settings)
    assert again.wait() == 0, again.err


def divergence() -> Sequence[Trial]:
    """Steps, values and places."""
    made = [
        Trial(f"{what} of step {step} times {value}", partial(_poisoned, _Poison(step, value, what)))
        for what in ("loss", "gradient")
        for step in (1, 4, 7)
        for value in (float("nan"), float("inf"))
    ]
    return made + [
        Trial(f"base weights with {value}", partial(_bad_base, value)) for value in (float("nan"), float("inf"))
    ]


def memory() -> Sequence[Trial]:
    """Limits of memory at several moments."""
    return [
        Trial(f"{room} MiB from {place} on", partial(_hungry, module, place, room))
        for module, place, rooms in (
            ("peftcli.train.setup", "prepare", (10, 40)),
            ("peftcli.train.training_loop", "fit", (1, 20, 60)),
            ("peftcli.train.runs.resume", "checkpoint_to_resume", (5, 30)),
        )
        for room in rooms
    ]


CAMPAIGNS = [
    Campaign(
        "divergence",
        "Training stops at the step, with exit code 9; nothing final is written, and the last good checkpoint stays.",
        divergence,
        least=14,
        sample=1,
    ),
    Campaign(
        "out of memory",
        "Exit code 8 with what to lower; nothing final is written, and with memory the same command goes on.",
        memory,
        least=6,
        sample=1,
    ),
]
