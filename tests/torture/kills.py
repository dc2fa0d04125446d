"""Runs that are killed, at random times and at every system call of a save, and end as if nothing had happened."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import hub_client
import strace
import training
import trainkit
from campaigns import Campaign, Trial
from hub_faults import ROWS, hub_with
from hub_server import Hub
from trainkit import Child, read_run, write_recipe

SEEDS = 30
"""Trials of random times for each recipe."""


@dataclass(frozen=True)
class Program:
    """Something that trains in a folder, and goes on where it stopped when it is started again."""

    name: str
    start: Callable[[Path, Callable[[], None] | None], Child]
    """Starts it in a folder, after the hook."""
    differences: Callable[[Path, Path], list[str]]
    """What of a folder's product is not as in another folder."""

    def finish(self, folder: Path, before: Callable[[], None] | None = None, seen: Path | None = None) -> None:
        """Start it once more: it must end, with the product of a run that was never disturbed.

        Args:
            folder: Where it was stopped.
            before: The hook.
            seen: Where the folder is seen from here, if not there.
        """
        child = self.start(folder, before)
        code = child.wait(strace.PATIENCE)
        assert code == 0, f"started again, it ended with {code}:\n{child.err}"
        differences = self.differences(seen or folder, uninterrupted(self).folder)
        assert not differences, f"{'; '.join(differences)}\n{child.err}"


@dataclass(frozen=True)
class Whole:
    """A run that nothing disturbed."""

    folder: Path
    seconds: float
    """Of CPU time."""


@functools.cache
def uninterrupted(program: Program) -> Whole:
    """Made once in this process, and kept."""
    _warm_up()
    folder = Path(tempfile.mkdtemp(dir=trainkit.scratch(), prefix="whole-"))
    child = program.start(folder, None)
    seconds = _run_for(child, math.inf)
    code = child.wait()
    assert code == 0, f"ended with {code}:\n{child.err}"
    return Whole(folder, seconds)


@functools.cache
def _warm_up() -> None:
    """The server that children are forked from takes seconds to start, which are no part of a run."""
    Child(trainkit.scratch() / "warm", "--version").wait()


# --- peftcli train ----------------------------------------------------------------------------------------------------


PRODUCT = ("adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "loss.png")
_METRICS = "out/metrics.jsonl"
ACCOUNT = ("status", "exit_code", "error", "resumable", "steps", "train_loss", "eval", "parameters")
"""What of run.json does not depend on when and how often the run was stopped."""


def peftcli(*settings: str) -> Callable[[Path, Callable[[], None] | None], Child]:
    """``peftcli train`` with these settings, and with a token cache of its own."""

    def start(folder: Path, before: Callable[[], None] | None) -> Child:
        recipe = write_recipe(folder)
        own = [setting.replace("FOLDER", str(folder)) for setting in settings]
        return Child(folder, "train", recipe, *own, env={"PEFTCLI_CACHE": f"{folder}/cache"}, before=before)

    return start


def differences(folder: Path, whole: Path) -> list[str]:
    """What of a run is not as in the run that nothing disturbed."""
    out, expected = folder / "out", whole / "out"
    names = {str(path.relative_to(out)) for path in out.rglob("*")}
    wanted = {str(path.relative_to(expected)) for path in expected.rglob("*")}
    found = [f"{name} is left over" for name in sorted(names - wanted)]
    found += [f"{name} is missing" for name in sorted(wanted - names)]
    for name in sorted(names & wanted):
        compared = name in PRODUCT or (name.startswith("checkpoints/") and not name.endswith("MANIFEST.json"))
        if compared and (out / name).is_file() and (out / name).read_bytes() != (expected / name).read_bytes():
            found.append(f"{name} has other bytes")
    found += filter(None, map(damage, out.glob("checkpoints/step-*")))  # the manifest names the recipe's own paths
    run, account = read_run(out), read_run(expected)
    return found + [f"run.json: {key} is {run[key]}, not {account[key]}" for key in ACCOUNT if run[key] != account[key]]


def damage(checkpoint: Path) -> str | None:
    """What a checkpoint's manifest says and does not hold; worked out apart from peftcli."""
    try:
        listed = json.loads((checkpoint / "MANIFEST.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{checkpoint.name}: its manifest cannot be read: {error}"
    if {path.name for path in checkpoint.iterdir()} != {*listed, "MANIFEST.json"}:
        return f"{checkpoint.name}: other files than in its manifest"
    for name, said in listed.items():
        content = (checkpoint / name).read_bytes()
        if (len(content), hashlib.sha256(content).hexdigest()) != (said["bytes"], said["sha256"]):
            return f"{checkpoint.name}: {name} is not as in its manifest"
    return None


def streamed(*settings: str) -> Callable[[Path, Callable[[], None] | None], Child]:
    """``peftcli train`` on rows that a hub on 127.0.0.1 streams, and with caches of its own."""

    def start(folder: Path, before: Callable[[], None] | None) -> Child:
        assert before is None
        rows = (f"dataset.train={ROWS.removeprefix('datasets/')}", "dataset.eval=null", "dataset.streaming=true")
        command = ("train", write_recipe(folder), *rows, *settings)
        return hub_client.start(folder, *command, url=_hub().url, cache=folder / "cache")[0]

    return start


def together(folder: Path, before: Callable[[], None] | None) -> Child:
    """``peftcli train --together`` of two recipes."""
    recipes = [write_recipe(folder / name) for name in _BOTH]
    settings = ("training.save_strategy=steps", "training.save_steps=2", "training.bf16=true")
    environment = {"PEFTCLI_CACHE": f"{folder}/cache"}
    return Child(folder, "train", *recipes, "--together", *settings, env=environment, before=before)


def of_both(folder: Path, whole: Path) -> list[str]:
    """The differences of two runs."""
    return [f"{name}: {each}" for name in _BOTH for each in differences(folder / name, whole / name)]


_BOTH = ("one", "two")


@functools.cache
def _hub() -> Hub:
    """Serves as long as this process lives."""
    return hub_with(ROWS)


_SMALL = ("training.per_device_train_batch_size=2", "training.save_strategy=steps", "training.logging_steps=2")
LORA = Program(
    "LoRA, dropout, gradient accumulation, warm-up, best adapter",
    peftcli(
        *_SMALL,
        "method.lora_dropout=0.2",
        "training.gradient_accumulation_steps=2",
        "training.warmup_steps=2",
        "training.save_steps=2",
        "training.eval_strategy=steps",
        "training.eval_steps=2",
        "training.eval_on_start=true",
        "training.load_best_model_at_end=true",
    ),
    differences,
)
PROGRAMS = [
    LORA,
    Program(
        "prompt tuning, cosine",
        peftcli(
            *_SMALL,
            trainkit.PROMPT_TUNING,
            "training.save_steps=1",
            "training.lr_scheduler_type=cosine",
            "training.warmup_ratio=0.25",
        ),
        differences,
    ),
    Program(
        "packing, three epochs",
        peftcli(
            "dataset.packing=true",
            "training.per_device_train_batch_size=1",
            "training.max_steps=-1",
            "training.num_train_epochs=3",
            "training.save_strategy=epoch",
            "training.eval_strategy=epoch",
        ),
        differences,
    ),
    Program(
        "group_by_length, epochs that end within an accumulation",
        peftcli(
            *_SMALL,
            "training.train_sampling_strategy=group_by_length",
            "training.per_device_train_batch_size=3",
            "training.gradient_accumulation_steps=3",
            "training.lr_scheduler_type=inverse_sqrt",
            "training.save_steps=3",
        ),
        differences,
    ),
    Program(
        "a mix of two datasets, LoRA+",
        peftcli(
            *_SMALL,
            "dataset.train=null",
            "dataset.mix=[{train: FOLDER/train.jsonl, weight: 1}, {train: FOLDER/eval.jsonl, weight: 2}]",
            "dataset.eval=null",
            "training.loraplus_lr_ratio=8",
            "training.save_steps=2",
        ),
        differences,
    ),
    Program(
        "best adapter before the end, weight decay, held-out rows",
        peftcli(
            *_SMALL,
            "dataset.eval=null",
            "dataset.eval_fraction=0.3",
            "training.eval_strategy=steps",
            "training.eval_steps=1",
            "training.greater_is_better=true",
            "training.load_best_model_at_end=true",
            "training.weight_decay=0.1",
            "training.save_steps=3",
            "training.save_total_limit=3",
        ),
        differences,
    ),
    Program(
        "AdaLoRA, whose ranks change while it trains",
        peftcli(
            *_SMALL,
            "method={type: adalora, init_r: 4, target_r: 2, total_step: 8, tinit: 2, tfinal: 2, deltaT: 1,"
            " target_modules: all-linear}",
            "training.save_steps=2",
        ),
        differences,
    ),
    Program(
        "bfloat16, as everything comes", peftcli(*_SMALL, "training.bf16=true", "training.save_steps=2"), differences
    ),
    Program("two recipes together", together, of_both),
    Program("rows streamed from a hub", streamed(*_SMALL, "training.save_steps=2"), differences),
]


# --- at random times --------------------------------------------------------------------------------------------------


def kill_at_random(program: Program, seed: int, folder: Path, seeds: int = SEEDS) -> None:
    """Kill a run one to three times, then let it end.

    The first kills of all seeds are spread evenly over the run; the others come at any time.
    """
    chance, seconds = random.Random(f"{program.name} {seed}"), uninterrupted(program).seconds
    moment = (seed + chance.random()) / seeds * seconds
    while not _killed(program, folder, moment):  # it was faster than the one that was timed
        shutil.rmtree(folder)
        folder.mkdir()
        moment *= 0.9
    for _ in range(seed % 3):
        if not _killed(program, folder, chance.uniform(0, seconds)):
            break
    program.finish(folder)


def _killed(program: Program, folder: Path, moment: float) -> bool:
    """Start the program and kill it after ``moment`` seconds of CPU time. Whether it was still running."""
    child = program.start(folder, None)
    _run_for(child, moment)
    child.signal(signal.SIGKILL)
    code = child.wait()
    assert code in (0, -signal.SIGKILL), f"ended with {code}:\n{child.err}"
    return code != 0


def _run_for(child: Child, seconds: float) -> float:
    """Wait until the child has ended or has had so much CPU time, which a busy machine does not change. Gives it."""
    clock, had = ~child.process.pid << 3 | 2, 0.0  # as Linux counts the clocks of processes
    while child.process.is_alive() and had < seconds:
        with contextlib.suppress(OSError):  # it is just ending
            had = time.clock_gettime(clock)
        child.process.join(0.0005)
    return had


def _random_kills() -> Sequence[Trial]:
    return [
        Trial(f"{program.name}, seed {seed}", functools.partial(kill_at_random, program, seed))
        for seed in range(SEEDS)
        for program in PROGRAMS
    ]


# --- at every system call of a save, and of a resume ------------------------------------------------------------------


LAST = "step-000008"
"""The last checkpoint of LORA: two stand before it, of which it replaces the older one."""


@functools.cache
def points(program: Program) -> list[strace.Point]:
    """The calls by which the program changes its run folder, in their order."""
    strace.require()
    _warm_up()
    folder = Path(tempfile.mkdtemp(dir=trainkit.scratch(), prefix="traced-"))
    return [point for point in strace.points(program.start, folder) if point.path.split("/")[0] == "out"]


def of_start(found: list[strace.Point]) -> list[strace.Point]:
    """Those before the first line of metrics.jsonl."""
    return list(itertools.takewhile(lambda point: (point.syscall, point.path) != ("write", _METRICS), found))


def of_saves(found: list[strace.Point]) -> list[strace.Point]:
    """Those of the last checkpoint and of all that comes after it: the rest of the run and its product."""
    return list(itertools.dropwhile(lambda point: LAST not in point.path, found))


def kill_at(program: Program, point: strace.Point, folder: Path) -> None:
    """Kill a run when it is about to make a call, then let it end."""
    strace.inject(program.start, folder, point, "signal=SIGKILL")
    program.finish(folder)


DAMAGED = "step-000007"
"""The newest checkpoint of RESUMED, which is to be set aside."""


def _resume(folder: Path, before: Callable[[], None] | None) -> Child:
    """Goes on with a stopped run whose newest checkpoint is damaged, among what killed runs leave."""
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        training.stopped_copy(folder)
        out = folder / "out"
        shutil.copytree(out / "checkpoints/step-000006", out / "checkpoints/.step-000008.tmp")
        shutil.copytree(out / "checkpoints/step-000006", out / "checkpoints/.old-step-000003")
        shutil.copytree(out / f"checkpoints/{DAMAGED}", out / f"checkpoints/.damaged-{DAMAGED}")
        (out / "checkpoints/.old-step-000003/MANIFEST.json").unlink()
        os.truncate(out / f"checkpoints/{DAMAGED}/optimizer.safetensors", 100)
        (out / ".run.json.4711.tmp").write_text('{"schema')
    return Child(folder, "train", recipe, *training.FULL, before=before)


def _differences_of_resumed(folder: Path, _whole: Path) -> list[str]:
    try:
        training.assert_same(folder / "out", training.whole())
    except AssertionError as error:
        return [str(error)]
    return []


RESUMED = Program("a stopped run that goes on", _resume, _differences_of_resumed)


@dataclass(frozen=True)
class Calls:
    """Calls of a program, shared out among trials whose number does not depend on the machine."""

    program: Program
    chosen: Callable[[list[strace.Point]], list[strace.Point]]
    """Of all its calls."""
    count: int
    """Of trials. The program may make some calls more; the first trials then have two."""

    def each(self, number: int, fault: Callable[[strace.Point, Path], None], folder: Path) -> None:
        """One trial: let the fault happen at its calls, each time in a folder of its own."""
        found = self.chosen(points(self.program))
        assert len(found) >= self.count, f"there are {len(found)} calls, fewer than trials"
        for point in found[number :: self.count]:
            try:
                fault(point, Path(tempfile.mkdtemp(dir=folder)))
            except AssertionError as error:
                raise AssertionError(f"{point.name}: {error}") from error

    def kills(self) -> list[Trial]:
        """SIGKILL at each."""
        kill = functools.partial(kill_at, self.program)
        return [
            Trial(f"at call {number + 1}", functools.partial(self.each, number, kill)) for number in range(self.count)
        ]


SAVE = Calls(LORA, lambda found: of_saves(found) + of_start(found), 120)
RESUME = Calls(RESUMED, of_start, 39)


CAMPAIGNS = [
    Campaign(
        "SIGKILL at a random time",
        "The same command again ends with the bytes of the run that was never killed.",
        _random_kills,
        least=300,
        sample=0,  # tests/train kills too
    ),
    Campaign(
        "SIGKILL at every system call of a save",
        "Whatever the kill left, the same command again ends with the bytes of the run that was never killed.",
        SAVE.kills,
        least=120,
        sample=0,  # tests/train kills at writes, and other_commands at system calls
    ),
    Campaign(
        "SIGKILL at every system call of a resume",
        "Whatever the kill left, the same command again ends with the bytes of the run that was never killed.",
        RESUME.kills,
        least=39,
        sample=0,  # those of damaged checkpoints resume too
    ),
]
