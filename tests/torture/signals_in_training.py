"""Signals, time limits and requests for a checkpoint in every phase of a training run."""

from __future__ import annotations

import importlib
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from campaigns import Campaign, Trial
from training import assert_same, whole
from trainkit import FULL, Child, read_metrics, read_run, write_recipe

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
MOMENTS: dict[str, tuple[str, str, Sequence[int]]] = {
    "the recipe is read": ("peftcli.recipe", "load_recipe", (1,)),
    "torch is loaded": ("peftcli.train.devices.launch", "follow_parent", (1,)),
    "the folder is opened": ("peftcli.train.runs.resume", "identity", (1,)),
    "the tokenizer is loaded": ("peftcli.models.open:OpenBase", "processor", (1,)),
    "the data is read": ("peftcli.train.read_data", "load_data", (1,)),
    "rows are encoded": ("peftcli.tasks.text.encode", "encode_marked", (1, 2)),
    "the model is loaded": ("peftcli.train.setup", "adapted_model", (1,)),
    "the optimizer is made": ("peftcli.train.setup", "prepare", (1,)),
    "a checkpoint is looked for": ("peftcli.train.runs.resume", "checkpoint_to_resume", (1,)),
    "a step is made": ("peftcli.train.loop:Gradients", "of", (1, 2, 5, 8)),
    "an evaluation goes on": ("peftcli.train.training_loop:TrainingLoop", "request", (1, 2, 4, 6, 9)),
    "a checkpoint is written": ("peftcli.core.files", "write_file", (1, 2, 3, 4)),
    "a checkpoint is described": ("peftcli.train.runs.checkpoint", "write_file", (1, 2)),
    "a checkpoint gets its name": ("peftcli.train.runs.checkpoint", "sync_folder", (1,)),
    "run.json is written": ("peftcli.train.runs.folder", "write_file", (3, 4)),
    "the adapter is written": ("peftcli.train.finish", "write_card", (1,)),
}
"""What is called then (module, perhaps class, and name), and at which of its calls the signal comes."""


@dataclass(frozen=True)
class SignalAt:
    """Sends itself a signal before the ``count``-th call of something, or several signals."""

    place: str
    name: str
    count: int
    numbers: tuple[int, ...]

    def __call__(self) -> None:
        module, _, inside = self.place.partition(":")
        owner = importlib.import_module(module)
        owner = getattr(owner, inside) if inside else owner
        original, calls = getattr(owner, self.name), [0]

        def watched(*args: object, **settings: object) -> object:
            calls[0] += 1
            if calls[0] == self.count:
                for index, number in enumerate(self.numbers):
                    if index:
                        time.sleep(0.4)  # what comes at once is taken for an echo
                    os.kill(os.getpid(), number)
            return original(*args, **settings)

        setattr(owner, self.name, watched)


def _stopped_well(child: Child, out: Path, number: int) -> int:
    """The child ended as a signal has to end it. Gives its exit code."""
    code, name = child.wait(), signal.Signals(number).name
    run = read_run(out) if (out / "run.json").exists() else None
    saved = run is not None and bool(run["resumable"])
    expected = 130 if number == signal.SIGINT else 75 if saved else 143
    assert code in (0, expected), f"exit code {code}, not {expected}: {child.err[-500:]}"
    assert "Traceback" not in child.err, child.err
    if code == 0:
        assert run is not None
        assert run["status"] == "complete"
        return 0
    assert f"({name})" in child.err, child.err[-500:]
    assert ("run the same command again" in child.err) == saved, child.err[-500:]
    assert run is None or (run["status"], run["exit_code"]) == ("interrupted", code), (
        f"{run['status']} {run['exit_code']}"
    )
    assert "done:" not in child.out, "it says that it is done"
    assert not (out / "adapter_model.safetensors").exists(), "an adapter of an unfinished run"
    return code


def _signalled(moment: SignalAt, may_end: bool, folder: Path) -> None:
    """One signal: a message, the right exit code, and the same command goes on to the same bytes."""
    recipe, out = write_recipe(folder), folder / "out"
    child = Child(folder, "train", recipe, *FULL, before=moment, env={"PEFTCLI_CACHE": str(folder / "cache")})
    code = _stopped_well(child, out, moment.numbers[0])
    assert code or may_end, "the signal was lost"
    _goes_on(folder, recipe)


def _goes_on(folder: Path, recipe: Path) -> None:
    again = Child(folder, "train", recipe, *FULL)
    assert again.wait() == 0, again.err
    assert_same(folder / "out", whole())


def _signalled_twice(moment: SignalAt, folder: Path) -> None:
    """The second signal ends the process at once; nothing is lost."""
    recipe = write_recipe(folder)
    child = Child(folder, "train", recipe, *FULL, before=moment)
    code = child.wait()
    assert code == 128 + moment.numbers[1], f"exit code {code}: {child.err}"
    assert not (folder / "out/adapter_model.safetensors").exists()
    _goes_on(folder, recipe)


def _at_random(seed: int, folder: Path) -> None:
    """Signals from outside at random times, one attempt after another, until the run is complete."""
    chance = random.Random(seed)
    recipe, codes = write_recipe(folder), list[int]()
    for attempt in range(30):
        child = Child(folder, "train", recipe, *FULL)
        number = chance.choice(STOP_SIGNALS)
        child.process.join(chance.uniform(0.3, 2.5 + attempt))
        child.signal(number)
        codes.append(child.wait())
        if codes[-1] == 0:
            break
        # before peftcli listens, a signal does what signals do
        assert codes[-1] in (75, 130, 143, -number) or not child.begun, f"{codes}: {child.err}"
    else:
        raise AssertionError(f"it never ended: {codes}")
    assert_same(folder / "out", whole())


def _saved_on_signal(step: int, folder: Path) -> None:
    """USR2: a checkpoint of that step, and training goes on to the same bytes."""
    recipe = write_recipe(folder)
    moment = SignalAt("peftcli.train.loop:Gradients", "of", step, (signal.SIGUSR2,))
    child = Child(folder, "train", recipe, *FULL, before=moment)
    assert child.wait() == 0, child.err
    assert f"checkpoint: {folder}/out/checkpoints/step-{step:06d}" in child.err, child.err
    assert_same(folder / "out", whole())


def _saved_on_usr1(folder: Path) -> None:
    """save_on_signal: SIGUSR1 makes USR1 a request for a checkpoint; TERM still stops."""
    recipe, asked = write_recipe(folder), "training.save_on_signal=SIGUSR1"
    moment = SignalAt("peftcli.train.loop:Gradients", "of", 2, (signal.SIGUSR1, signal.SIGTERM))
    child = Child(folder, "train", recipe, *FULL, asked, before=moment)
    assert child.wait() == 75, child.err
    assert read_run(folder / "out")["steps"]["done"] == 2
    _goes_on(folder, recipe)


def _limited(seconds: int, folder: Path) -> None:
    """max_time: each attempt ends with 75 and does at least one step; the last one is complete."""
    recipe, done = write_recipe(folder), 0
    for _ in range(12):
        slow = partial(_slow_steps, 0.35)
        child = Child(folder, "train", recipe, *FULL, f"training.max_time={seconds}s", before=slow)
        code = child.wait()
        if code == 0:
            break
        assert code == 75, child.err
        assert "training.max_time" in child.err, child.err
        now = read_run(folder / "out")["steps"]["done"]
        assert now > done, f"no step was made after step {done}"
        done = now
    else:
        raise AssertionError("it never ended")
    assert done, "the time was never over"
    assert_same(folder / "out", whole())


def _slow_steps(seconds: float) -> None:
    import peftcli.system.signals
    from peftcli.train.plan import Plan

    peftcli.system.signals.STARTED = time.monotonic()  # the child was forked from a process that started long ago
    global_batch = Plan.global_batch

    def slowly(self: Plan, step: int) -> list[int]:
        time.sleep(seconds)
        return global_batch(self, step)

    Plan.global_batch = slowly


def _continued(number: int, folder: Path) -> None:
    """A signal while a resumed run is loaded: 75 (130), since its checkpoint still stands."""
    recipe = write_recipe(folder)
    first = SignalAt("peftcli.train.loop:Gradients", "of", 4, (signal.SIGTERM,))
    assert Child(folder, "train", recipe, *FULL, before=first).wait() == 75
    before = read_metrics(folder / "out")
    for name, (place, attribute, _) in list(MOMENTS.items())[1:9]:  # those before the first step
        if name == "rows are encoded":
            continue  # they are in the cache
        moment = SignalAt(place, attribute, 1, (number,))
        child = Child(folder, "train", recipe, *FULL, before=moment)
        code = child.wait()
        assert code == (130 if number == signal.SIGINT else 75), f"{name}: {code}: {child.err}"
        run = read_run(folder / "out")
        assert run["steps"]["done"] == 4, f"{name}: steps {run['steps']}"
        assert read_metrics(folder / "out")[: len(before)] == before, name
    _goes_on(folder, recipe)


def trials() -> Sequence[Trial]:
    """Each moment with each signal, second signals, signals at random times, requests and time limits."""
    made = [
        Trial(
            f"{signal.Signals(number).name} when {name}, call {count}",
            partial(
                _signalled, SignalAt(place, attribute, count, (number,)), name.startswith("the adapter") or count == 8
            ),
        )
        for name, (place, attribute, counts) in MOMENTS.items()
        for count in counts
        for number in STOP_SIGNALS
    ]
    made += [
        Trial(
            f"{signal.Signals(one).name}, then {signal.Signals(two).name}, in step {step}",
            partial(_signalled_twice, SignalAt("peftcli.train.loop:Gradients", "of", step, (one, two))),
        )
        for step, one, two in ((2, 15, 15), (4, 2, 2), (5, 10, 15), (7, 15, 2))
    ]
    made += [Trial(f"at random times, seed {seed}", partial(_at_random, seed)) for seed in range(12)]
    made += [Trial(f"USR2 in step {step}", partial(_saved_on_signal, step)) for step in (1, 2, 4, 7)]
    made += [Trial("save_on_signal: SIGUSR1", _saved_on_usr1)]
    made += [Trial(f"max_time: {seconds}s", partial(_limited, seconds)) for seconds in (1, 2)]
    return made + [
        Trial(f"{signal.Signals(number).name} while a resumed run is loaded", partial(_continued, number))
        for number in STOP_SIGNALS
    ]


CAMPAIGNS = [
    Campaign(
        "signals while training",
        "One message; exit code 75 with a checkpoint, 143 without, 130 for Ctrl-C; run.json says interrupted; the same "
        "command ends byte-identical. A second signal ends at once; USR2 saves and goes on; a time limit ends with 75.",
        trials,
        least=60,
        sample=2,
    )
]
