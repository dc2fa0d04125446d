"""Start a run: in this process, or in one process for each device. Nothing here imports torch until it is needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftcli.errors import PeftcliError
from peftcli.models.hub_files import hash_ahead
from peftcli.schema import Recipe
from peftcli.system import signals
from peftcli.system.outputs import expand_user
from peftcli.train.devices import launch
from peftcli.train.events import OnEvent
from peftcli.train.runs.folder import RunFolder, StartOptions


def start(recipe: Recipe, command: Sequence[str], options: StartOptions, tell: OnEvent) -> dict[str, Any] | None:
    """Train what a recipe describes, in as many processes as it wants; return the content of run.json.

    ``command`` are the words after ``peftcli`` that start one more process of this run.
    None: another process has it, and prints the answer.

    Raises:
        PeftcliError: of the kind that its class says.
    """
    folder = RunFolder(Path(recipe.training.output_dir))
    note_resumable(folder)
    launch.follow_parent()
    if recipe.launch.strategy == "ddp":  # or torch warns in each process if a step uses all that trains
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not launch.is_launched():
        count = launch.process_count(recipe.launch)
        if count > 1 or recipe.launch.num_machines > 1:
            from peftcli.train.devices.machines import start_processes

            start_processes(recipe, folder, command, count, options.overwrite, tell)
            return None

    hash_ahead(expand_user(Path(recipe.base_model.name)))

    from peftcli.train import fresh_process, run

    with launch.leave_group_on_exit():
        finished = run.train(recipe, options, tell, signals.STARTED)
    if not launch.is_main_process():
        return None
    if recipe.training.verify and not launch.started_by_peftcli():  # which verifies, when these processes have ended
        fresh_process.release_gpu_memory()
        fresh_process.verify_run(folder.path, tell)
    return finished


def note_resumable(folder: RunFolder) -> None:
    """Note whether there is a checkpoint: a signal that comes while torch is imported decides the exit code by it."""
    try:
        record = folder.read()
    except PeftcliError:  # raised again later, with all that is wrong
        return
    signals.current().saved |= record is not None and record.resumable
