"""Checkpoints: everything that training needs to go on as if it had never stopped. No pickle.

A checkpoint is a folder ``step-000100`` with adapter, optimizer, schedule, random states and progress, and a
``MANIFEST.json`` of every file's size and sha256. It gets its name only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.files import read_tensors, sync_folder, write_adapter, write_file
from peftcli.core.weights import adapter_state, load_training_state, named_tensors, unsaved_state
from peftcli.errors import StorageError
from peftcli.train.loop import Trainee

_MANIFEST = "MANIFEST.json"
_TRAINING_STATE = "training_state.safetensors"
"""What training needs of the adapter and the adapter file does not hold as it is; most methods have nothing such."""


@dataclass
class Progress:
    """How far a run is. All of it goes through checkpoints."""

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


@dataclass
class State:
    """What a checkpoint holds, live."""

    trainee: Trainee
    model: nn.Module
    """The model without accelerate's wrapper."""
    config: AdapterConfig
    progress: Progress
    best_adapter: dict[str, torch.Tensor] | None = None
    """The adapter at the best evaluation, where the recipe keeps that one."""


def save_checkpoint(folder: Path, state: State, keep: int, accelerator: Accelerator) -> Path:
    """Write a checkpoint below ``folder``, then delete all but the ``keep`` newest.

    Raises:
        StorageError: it cannot be written; the older checkpoints stand.
    """
    final = folder / f"step-{state.progress.step:06d}"
    temporary = folder / f".{final.name}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    _write_tensors(temporary / _random_file(accelerator.process_index), _random_state())
    if accelerator.is_main_process:
        write_adapter(adapter_state(state.model), state.config, temporary)
        if extra := unsaved_state(state.model):
            _write_tensors(temporary / _TRAINING_STATE, extra)
        _write_tensors(temporary / "optimizer.safetensors", _optimizer_state(state))
        if state.best_adapter is not None:
            _write_tensors(temporary / "best_adapter.safetensors", state.best_adapter)
        _write_json(temporary / "schedule.json", _schedule_state(state))
        _write_json(temporary / "progress.json", asdict(state.progress))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _write_json(temporary / _MANIFEST, _manifest(temporary, state.progress.step, accelerator.num_processes))
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync_folder(folder)
        for old in checkpoints(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints below ``folder``, newest first, unverified."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def newest_whole(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose every file is as it was written; damaged ones are set aside with a warning."""
    for path in checkpoints(folder):
        if (reason := damage(path)) is None:
            return path
        aside = path.with_name(f".damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        warn(f"{path.name} is damaged ({reason}); set aside as {aside.name}, using the one before")
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None when every file has the size and sha256 that its manifest says."""
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        listed = dict(manifest["files"])
        found = {entry.name for entry in path.iterdir()} - {_MANIFEST}
        if found != set(listed):
            return f"files differ from the manifest: {min(found ^ set(listed))}"
        for name, said in listed.items():
            file = path / name
            if file.is_symlink() or not file.is_file():
                return f"{name} is no regular file"
            if file.stat().st_size != said["bytes"] or sha256(file) != said["sha256"]:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST}: {error}"
    return None


def load_checkpoint(path: Path, state: State, accelerator: Accelerator) -> None:
    """Fill ``state`` from a checkpoint.

    Raises:
        StorageError: it was written by another number of processes, or cannot be read.
    """
    manifest = json.loads((path / _MANIFEST).read_bytes())
    if manifest["num_processes"] != accelerator.num_processes:
        raise StorageError(
            f"was written by {manifest['num_processes']} processes; this run has {accelerator.num_processes}",
            file=str(path),
        )
    extra = path / _TRAINING_STATE
    more = safetensors.torch.load_file(extra) if extra.exists() else {}
    load_training_state(state.model, {**read_tensors(path), **more})
    _load_optimizer(state, safetensors.torch.load_file(path / "optimizer.safetensors"))
    schedule = json.loads((path / "schedule.json").read_bytes())
    state.trainee.schedule.load_state_dict(schedule)
    for group, rate in zip(state.trainee.optimizer.param_groups, schedule["_last_lr"], strict=True):
        group["lr"] = rate
    for name, value in json.loads((path / "progress.json").read_bytes()).items():
        setattr(state.progress, name, value)
    best = path / "best_adapter.safetensors"
    state.best_adapter = safetensors.torch.load_file(best) if best.exists() else None
    _restore_random(safetensors.torch.load_file(path / _random_file(accelerator.process_index)))


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    """``hashlib.file_digest`` for Python 3.10."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _manifest(folder: Path, step: int, num_processes: int) -> dict[str, Any]:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != _MANIFEST
    }
    return {"step": step, "num_processes": num_processes, "files": files}


def _optimizer_state(state: State) -> dict[str, torch.Tensor]:
    """AdamW's averages under the adapter's tensor names."""
    return {
        f"{name}.{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for name, (_, _, parameter) in named_tensors(state.model).items()
        for key, value in state.trainee.optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(state: State, tensors: dict[str, torch.Tensor]) -> None:
    for name, (_, _, parameter) in named_tensors(state.model).items():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in tensors]
        loaded = {key: tensors[f"{name}.{key}"] for key in keys}
        state.trainee.optimizer.state[parameter] = {
            key: value if key == "step" else value.to(parameter.device) for key, value in loaded.items()
        }


def _schedule_state(state: State) -> dict[str, Any]:
    kept = state.trainee.schedule.state_dict()
    return {key: value for key, value in kept.items() if isinstance(value, (int, float, list, bool))}


def _random_state() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _random_file(process: int) -> str:
    return f"random-{process:05d}.safetensors"


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    contents = {name: value.detach().cpu().contiguous() for name, value in sorted(tensors.items())}
    write_file(path, safetensors.torch.save(contents, {"format": "pt"}))


def _write_json(path: Path, value: object) -> None:
    write_file(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
