"""What becomes of PEFT under transformers' Trainer when it is killed while it saves, or its checkpoint is damaged.

The numbers stand beside peftcli's in docs/reliability.md. Importing Trainer takes about ten seconds, so that one
process imports it and is forked for every run: ``python peers_trainer.py kills 60``.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STEPS, _EVERY, _KILLED = 8, 2, 6
"""The save after step 6 is the third: it also deletes the first."""


def trainer_kills(trials: int = 60) -> dict[str, int]:
    """SIGKILL at a random time of a save, then ``trainer.train(resume_from_checkpoint=True)``.

    Returns:
        ``trials``; ``resumed`` and ``could_not_resume``, which add up to it; ``identical``: those of the resumed that
        ended with the bytes of a run that was never killed.
    """
    return _apart("kills", str(trials))


def trainer_damage() -> dict[str, int]:
    """A damaged newest checkpoint, then the same.

    Returns:
        ``trials``; ``refused``, ``resumed_silently`` and ``resumed_with_warning``, which add up to it;
        ``other_weights``: those that ended with other bytes than a run that was never damaged.
    """
    return _apart("damage")


def _apart(*arguments: str) -> dict[str, int]:
    """This file in a process of its own."""
    here = Path(__file__)
    found = os.pathsep.join(filter(None, [str(here.parents[1]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(here), *arguments]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": found}, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


# --- in that process --------------------------------------------------------------------------------------------------


@dataclass
class Attempt:
    """A run of Trainer in a process of its own."""

    pid: int
    said: Path
    """What it wrote to stderr."""
    marks: int
    """A pipe that says ``(`` before the save of step 6, and ``)`` after it."""

    def wait(self) -> int:
        """Its exit code; negative: the signal that killed it."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.marks)
        return os.waitstatus_to_exitcode(status)


def start(folder: Path, resume: bool, stop: bool = False) -> Attempt:
    """Train in ``folder``; with ``stop`` only until the save of step 6 is done."""
    folder.mkdir(parents=True, exist_ok=True)
    said = folder / ("resumed.log" if resume else "first.log")
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return Attempt(pid, said, read)
    code = 1
    try:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        _train(folder, resume, write, stop)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _train(folder: Path, resume: bool, marks: int, stop: bool) -> None:
    import torch
    import trainkit
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Marks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == _KILLED:
                os.write(marks, b"(")

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == _KILLED:
                os.write(marks, b")")
                if stop:
                    os._exit(0)

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(trainkit.base_folder()),
        LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    ids = torch.randint(3, 300, (10, 24), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=_STEPS,
        save_steps=_EVERY,
        save_total_limit=2,
        logging_steps=1,
        learning_rate=5e-3,
        warmup_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,
        seed=42,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Marks()])
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))


def ended(attempt: Attempt) -> Attempt:
    """The attempt, which must have ended well."""
    code = attempt.wait()
    if code:
        raise RuntimeError(f"Trainer ended with {code} without being disturbed:\n{attempt.said.read_text()}")
    return attempt


def weights(folder: Path) -> bytes:
    """The adapter that a run ended with."""
    return (folder / "final/adapter_model.safetensors").read_bytes()


def kills(trials: int, scratch: Path) -> dict[str, int]:
    """Carries out ``trainer_kills``."""
    seconds = []
    for number in range(3):
        attempt = start(scratch / f"whole-{number}", resume=False)
        os.read(attempt.marks, 1)
        began = time.monotonic()
        os.read(attempt.marks, 1)
        seconds.append(time.monotonic() - began)
        ended(attempt)
    whole, length = weights(scratch / "whole-0"), statistics.median(seconds)
    if weights(scratch / "whole-1") != whole:
        raise RuntimeError("two undisturbed runs of Trainer end with different bytes")
    counts = {"trials": 0, "resumed": 0, "could_not_resume": 0, "identical": 0}
    chance = random.Random(0)
    while counts["trials"] < trials:
        folder = scratch / "killed"
        if _killed_in_save(folder, chance.uniform(0, length)):
            resumed = start(folder, resume=True).wait() == 0
            counts["trials"] += 1
            counts["resumed"] += resumed
            counts["could_not_resume"] += not resumed
            counts["identical"] += resumed and weights(folder) == whole
        shutil.rmtree(folder)
    return counts


def _killed_in_save(folder: Path, moment: float) -> bool:
    """Kill a run so many seconds after the save of step 6 began. Whether it was still saving."""
    attempt = start(folder, resume=False)
    assert os.read(attempt.marks, 1) == b"("
    time.sleep(moment)
    os.kill(attempt.pid, signal.SIGKILL)
    done = os.read(attempt.marks, 1)  # nothing, once the process has died without saying more
    attempt.wait()
    return not done


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _without_a_tensor(path: Path) -> None:
    import safetensors.torch

    tensors = safetensors.torch.load_file(path)
    del tensors[min(tensors)]
    path.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))


DAMAGE: list[tuple[str, Callable[[Path], object]]] = [
    *(
        (name, Path.unlink)
        for name in (
            "adapter_model.safetensors",
            "adapter_config.json",
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
            "trainer_state.json",
        )
    ),
    ("adapter_model.safetensors", _flip),
    ("optimizer.pt", _flip),
    ("adapter_model.safetensors", _without_a_tensor),
    ("adapter_model.safetensors", _halve),
    ("optimizer.pt", _halve),
    ("trainer_state.json", _halve),
]
"""Each: a file of the checkpoint, and what is done to it."""


def damage(scratch: Path) -> dict[str, int]:
    """Carries out ``trainer_damage``."""
    ended(start(scratch / "whole", resume=False))
    ended(start(scratch / "stopped", resume=False, stop=True))
    whole = weights(scratch / "whole")
    shutil.copytree(scratch / "stopped", scratch / "control")
    control = ended(start(scratch / "control", resume=True))
    if weights(scratch / "control") != whole:
        raise RuntimeError("Trainer does not resume to the same bytes from a whole checkpoint")
    said = set(control.said.read_text().splitlines())
    counts = dict.fromkeys(("trials", "refused", "resumed_silently", "resumed_with_warning", "other_weights"), 0)
    for number, (name, harm) in enumerate(DAMAGE):
        folder = scratch / f"damaged-{number}"
        shutil.copytree(scratch / "stopped", folder)
        harm(folder / f"out/checkpoint-{_KILLED}" / name)
        attempt = start(folder, resume=True)
        refused = attempt.wait() != 0
        warned = bool(set(attempt.said.read_text().splitlines()) - said)
        counts["trials"] += 1
        counts["refused"] += refused
        counts["resumed_with_warning"] += not refused and warned
        counts["resumed_silently"] += not refused and not warned
        counts["other_weights"] += not refused and weights(folder) != whole
    return counts


def _main() -> None:
    import trainkit
    import transformers

    importlib.import_module("transformers.trainer")
    transformers.utils.logging.disable_progress_bar()
    trainkit.base_folder()
    made: dict[str, Callable[[Path], dict[str, int]]] = {"damage": damage}
    if sys.argv[1] == "kills":
        made["kills"] = functools.partial(kills, int(sys.argv[2]))
    with tempfile.TemporaryDirectory(prefix="peftcli-trainer-") as scratch:
        print(json.dumps(made[sys.argv[1]](Path(scratch))))


if __name__ == "__main__":
    _main()
