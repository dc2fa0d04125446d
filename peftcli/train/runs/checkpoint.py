"""Checkpoints: everything that training needs to resume as if it had never stopped. No pickle.

A checkpoint is a folder ``step-000100`` with adapter, optimizer, random states and progress, and a ``MANIFEST.json``
of every file's size and sha256. It gets its name when it is complete. The learning rate and the order of the examples
are functions of the step, so they are not in it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.files import CONFIG_FILE, WEIGHTS_FILE, read_tensors, write_adapter, write_tensor_file
from peftcli.core.weights import (
    adapter_state,
    holds_its_file,
    load_state,
    load_training_state,
    named_tensors,
    training_state,
    unsaved_state,
)
from peftcli.errors import AdapterError, Diverged, PeftcliError, StorageError
from peftcli.guard.files import read_small
from peftcli.system.disk import remove_folder, sha256, sync_folder, write_file
from peftcli.system.outputs import storage_errors
from peftcli.train.loop import LESS_LEARNING, PreparedModel
from peftcli.train.optim import AVERAGES
from peftcli.train.runs.folder import LARGEST_RUN, checkpoints

_MANIFEST = "MANIFEST.json"
_SEAL = "manifest_sha256"
_PROGRESS = "progress.json"
_OPTIMIZER = "optimizer.safetensors"
_BEST = "best_adapter.safetensors"
_TRAINING_STATE = "training_state.safetensors"
"""State of the adapter that training needs and the adapter file does not contain; most methods have none."""

_NEEDED = {WEIGHTS_FILE, CONFIG_FILE, _PROGRESS, _OPTIMIZER, "random-00000.safetensors"}
_LARGEST_PROGRESS = 1 << 24
_LARGEST_MANIFEST = 2 * LARGEST_RUN
"""It contains run.json, further indented."""
OTHER_VERSION = "resume with the version that run.json has under versions; or choose another training.output_dir"
"""What to do with a checkpoint that this version cannot read."""
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)
"""Errors that mean a file is gone, or is not a file any more."""


@dataclass
class Progress:
    """How far a run is. All of it is saved in checkpoints."""

    step: int = 0
    """Steps done."""
    loss_sum: float = 0.0
    """Sum of the training loss over all targets so far."""
    num_targets: int = 0
    num_tokens: int = 0
    window_loss_sum: float = 0.0
    """The same since the last logged step."""
    window_num_targets: int = 0
    last_eval: dict[str, float] = field(default_factory=dict)
    first_eval: dict[str, float] = field(default_factory=dict)
    """Metrics before the first step, with eval_on_start."""
    best_eval: dict[str, float] = field(default_factory=dict)
    best_step: int = -1
    no_better: int = 0
    """Evaluations in a row that were no better than the best before them, by training.early_stopping_threshold."""
    pending: dict[str, Any] | None = None
    """The line of metrics.jsonl of a step whose evaluation is still to be made."""


@dataclass
class State:
    """The live state that a checkpoint saves."""

    prepared: PreparedModel
    model: nn.Module
    """The model without accelerate's wrapper."""
    progress: Progress
    best_adapter: dict[str, torch.Tensor] | None = None
    """The adapter at the best evaluation, where the recipe keeps the best."""

    def take_kept(self) -> bool:
        """Load the adapter that the run keeps into the model. Returns False where the model cannot hold it."""
        if self.best_adapter is None:  # the model has the last one, which is kept
            return True
        if not holds_its_file(self.model):
            return False
        self.prepared.gather_parameters()
        load_state(self.model, self.best_adapter)
        self.prepared.sync_parameters()
        return True


def save_checkpoint(folder: Path, state: State, keep: int, accelerator: Accelerator, made_by: dict[str, Any]) -> Path:
    """Write a checkpoint below ``folder``, then delete all but the ``keep`` newest.

    All processes save together. ``made_by`` has hashes of recipe, data and base model, and run.json.

    Raises:
        StorageError: it cannot be written; the older checkpoints are untouched.
        Diverged: the adapter contains NaN or Inf.
    """
    final = folder / f"step-{state.progress.step:06d}"
    state.prepared.gather_parameters()
    states = gather_object([{name: value.cpu() for name, value in random_state().items()}])
    remembered = _optimizer_state(state)
    if accelerator.is_main_process:
        temporary = folder / f".{final.name}.tmp"
        try:
            with storage_errors(temporary):
                if temporary.exists():
                    shutil.rmtree(temporary)
                temporary.mkdir(parents=True)
            for process, each in enumerate(states):  # other machines may not see the folder
                write_tensor_file(temporary / _random_file(process), each)
            write_finite(adapter_state(state.model), state.prepared.config, temporary)
            if extra := unsaved_state(state.model):
                write_tensor_file(temporary / _TRAINING_STATE, extra)
            write_tensor_file(temporary / _OPTIMIZER, remembered)
            if state.best_adapter is not None:
                write_tensor_file(temporary / _BEST, state.best_adapter)
            write_file(temporary / _PROGRESS, _as_json(asdict(state.progress)))
            counts = {"step": state.progress.step, "num_processes": accelerator.num_processes}
            paths = sorted(temporary.iterdir())
            files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}
            manifest = {**counts, "optim": state.prepared.optim, **made_by, "files": files}
            write_file(temporary / _MANIFEST, _as_json(_sealed(manifest)))
            with storage_errors(final):
                replaced = final.with_name(f".replaced-{final.name}")
                if final.exists():  # saved twice at one step; a kill between the renames loses neither: see ``tidy``
                    final.rename(replaced)
                temporary.rename(final)
                sync_folder(folder)
                if replaced.exists():
                    shutil.rmtree(replaced)
        except StorageError:  # what there is of it may fill the disk
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        prune(folder, keep)
    accelerator.wait_for_everyone()
    return final


def write_finite(tensors: Mapping[str, torch.Tensor], config: AdapterConfig, folder: Path) -> None:
    """Write a trained adapter.

    Raises:
        Diverged: it contains NaN or Inf.
        StorageError: it cannot be written.
    """
    try:
        write_adapter(tensors, config, folder)
    except AdapterError as error:
        raise Diverged(f"the adapter {error.message}", hint=LESS_LEARNING) from None


def tidy(folder: Path) -> None:
    """Remove what killed runs were writing and deleting. The run folder must be locked.

    Raises:
        StorageError: a file cannot be removed.
    """
    with storage_errors(folder):
        for path in folder.glob(".replaced-step-*"):
            if not (final := path.with_name(path.name.removeprefix(".replaced-"))).exists():
                path.rename(final)
        for path in folder.glob(".*"):
            if re.fullmatch(r"\.(step-\d+\.tmp|(old|replaced)-step-\d+)", path.name) and not path.is_symlink():
                shutil.rmtree(path)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints below ``folder``."""
    for old in checkpoints(folder)[keep:]:
        remove_folder(old, old.with_name(f".old-{old.name}"))


def newest_whole(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Find the newest undamaged checkpoint; damaged ones are set aside with a warning.

    Raises:
        StorageError: one cannot be read or set aside.
    """
    found = checkpoints(folder)
    for path, older in zip(found, [*found[1:], None], strict=False):
        if (reason := find_damage(path)) is None:
            return path
        aside = _set_aside(path, "damaged")
        instead = f"using {older.name}" if older else "and there is none before it"
        warn(f"{path.name} is damaged ({reason}); set aside as {aside.name}, {instead}")
    return None


def set_newer_aside(folder: Path, step: int, warn: Callable[[str], None]) -> None:
    """Set the checkpoints after ``step`` aside, when a run resumes from there with a change.

    Raises:
        StorageError: one cannot be moved.
    """
    for path in checkpoints(folder):
        if int(path.name.removeprefix("step-")) > step:
            aside = _set_aside(path, "left")
            warn(f"{path.name} is newer than the checkpoint to resume from; set aside as {aside.name}")


def _set_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint so that no run finds it; one of the same step that was set aside before stays."""
    aside, number = path.with_name(f".{why}-{path.name}"), 1
    with storage_errors(path):
        while os.path.lexists(aside):
            number += 1
            aside = path.with_name(f".{why}-{path.name}-{number}")
        path.rename(aside)
    return aside


def find_damage(path: Path) -> str | None:
    """Describe the damage of a checkpoint; None when every file has the size and sha256 of the manifest.

    Raises:
        StorageError: it cannot be read now, or by this version, which does not mean that it is damaged.
    """
    try:
        if path.is_symlink():
            return "it is a link"
        manifest = read_manifest(path)
        listed = dict(manifest["files"])
        found = {entry.name for entry in path.iterdir()} - {_MANIFEST}
        if found != set(listed):
            return f"files differ from the manifest: {min(found ^ set(listed))}"
        if missing := _NEEDED - found:
            return f"there is no {min(missing)}"
        for name, said in listed.items():
            file = path / name
            if file.is_symlink() or not file.is_file():
                return f"{name} is not a regular file"
            if file.stat().st_size != said["bytes"] or sha256(file) != said["sha256"]:
                return f"{name} has changed"
        named = re.search(r"step-(\d{6,})", path.resolve().name)  # one that was set aside has more to its name
        if named is None or not int(named[1]) == manifest["step"] == _progress(path).step:
            return "its step is not the one in its name"
    except OSError as error:
        if error.errno not in _NOT_THERE:
            file = error.filename or path
            hint = "if the disk has lost it for good, delete this checkpoint to resume from the one before"
            raise StorageError(f"cannot be read: {error.strerror}", file=str(file), hint=hint) from None
        return f"{_MANIFEST}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{_MANIFEST}: {error}"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not valid.
    """
    file = path / _MANIFEST
    if file.is_symlink():
        raise ValueError("it is a link")
    content = read_small(file, _LARGEST_MANIFEST)
    manifest = json.loads(content)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError("not the manifest of a checkpoint")
    if content != _as_json(_sealed(manifest)):
        raise ValueError("it has changed")
    return manifest


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a hash of the rest of it."""
    rest = {key: value for key, value in manifest.items() if key != _SEAL}
    return {**rest, _SEAL: hashlib.sha256(_as_json(rest)).hexdigest()}


def _as_json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


class Misfit(StorageError):
    """A checkpoint holds something else than what the run trains."""


def load_checkpoint(path: Path, state: State, accelerator: Accelerator) -> None:
    """Fill ``state`` from a checkpoint.

    Where fewer processes wrote it, the additional ones start with random states of their own.

    Raises:
        StorageError: it does not fit the model, or cannot be read.
    """
    try:
        manifest = read_manifest(path)
        known = accelerator.process_index < manifest["num_processes"]
        extra = path / _TRAINING_STATE
        more = safetensors.torch.load_file(extra) if extra.exists() else {}
        tensors = {**read_tensors(path), **more}
        if strange := tensors.keys() - adapter_state(state.model).keys() - training_state(state.model).keys():
            raise ValueError(f"{WEIGHTS_FILE} contains {min(strange)}, which this adapter does not have")
        load_training_state(state.model, tensors)
        if manifest["optim"] == state.prepared.optim:  # or else --allow-change training.optim
            _load_optimizer(state, safetensors.torch.load_file(path / _OPTIMIZER))
        state.prepared.sync_parameters()
        for name, value in asdict(_progress(path)).items():
            setattr(state.progress, name, value)
        best = path / _BEST
        state.best_adapter = safetensors.torch.load_file(best) if best.exists() else None
        _set_schedule(state)
        random = path / _random_file(accelerator.process_index)
        if random.exists():
            restore_random(safetensors.torch.load_file(random))
        elif known:
            raise ValueError(f"there is no {random.name}")
    except PeftcliError as error:
        raise Misfit(f"does not fit this run: {error.message}", file=str(path)) from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        kind = StorageError if isinstance(error, OSError) else Misfit
        raise kind(f"does not fit this run: {str(error)[:300]}", file=str(path)) from None


def _progress(path: Path) -> Progress:
    """Read how far a checkpoint's run was."""
    values = json.loads(read_small(path / _PROGRESS, _LARGEST_PROGRESS))
    fresh = asdict(Progress())
    if not isinstance(values, dict) or values.keys() != fresh.keys():
        raise StorageError("was written by another version of peftcli", file=str(path), hint=OTHER_VERSION)
    for name, value in fresh.items():
        if type(values[name]) is not type(value) and not (name == "pending" and isinstance(values[name], dict)):
            raise ValueError(f"{_PROGRESS}: {name} is wrong")
    return Progress(**values)


def _set_schedule(state: State) -> None:
    """Set the schedule to the steps done; it depends on nothing else."""
    schedule, optimizer = state.prepared.schedule, state.prepared.optimizer
    assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
    step = schedule.last_epoch = state.progress.step
    rates = [base * share(step) for base, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    schedule._last_lr = rates
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _optimizer_state(state: State) -> dict[str, torch.Tensor]:
    """What the optimizer remembers of each tensor, under the adapter's name of it. A number is one of 64 bits."""
    kept = state.prepared.optimizer_state()
    return {
        f"{name}.{key}": value
        if isinstance(value, torch.Tensor)
        else torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
        for name, (_, _, parameter) in named_tensors(state.model).items()
        for key, value in kept.get(parameter, {}).items()
    }


def _load_optimizer(state: State, tensors: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless the tensors are what the optimizer remembers of tensors of the model."""
    named = {name: parameter for name, (_, _, parameter) in named_tensors(state.model).items()}
    found: dict[nn.Parameter, dict[str, Any]] = {parameter: {} for parameter in named.values()}
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        if name not in named:
            raise ValueError(f"{_OPTIMIZER}: {full} belongs to another optimizer or adapter")
        if key in AVERAGES and value.shape != named[name].shape:
            raise ValueError(f"{_OPTIMIZER}: {name} has another shape")
        is_number = value.ndim == 0 and value.dtype in (torch.int64, torch.float64)
        found[named[name]][key] = value.item() if is_number else value
    kinds = {(parameter.ndim, frozenset(values)) for parameter, values in found.items() if values}
    in_bits = any("qmap1" in keys for _, keys in kinds)  # by bitsandbytes, which keeps small tensors otherwise
    if not in_bits and len(kinds) > len({ndim for ndim, _ in kinds}):
        raise ValueError(f"{_OPTIMIZER}: something that the optimizer remembers is missing")
    state.prepared.load_optimizer_state(found)


def random_state() -> dict[str, torch.Tensor]:
    """The states of this process's random number generators, for ``restore_random``."""
    numpy: Any = np.random.get_state(legacy=False)  # from which models draw what they mask (SpecAugment)
    place = [*numpy["state"]["key"].tolist(), numpy["state"]["pos"], numpy["has_gauss"]]
    states = {
        "cpu": torch.get_rng_state(),
        "numpy": torch.tensor(place),
        "numpy_gauss": torch.tensor(numpy["gauss"], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(states: dict[str, torch.Tensor]) -> None:
    """Restore the random number generators to a ``random_state``."""
    torch.set_rng_state(states["cpu"])
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, float(states["numpy_gauss"])))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _random_file(process: int) -> str:
    return f"random-{process:05d}.safetensors"
