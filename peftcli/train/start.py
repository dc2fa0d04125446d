"""Start a run: in this process, or in one process for each device. Nothing here imports torch until it is needed.

Around several processes it does what is done once: it locks the folder, encodes the data, and has the result verified.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftcli.errors import FolderBusy, PeftcliError
from peftcli.models.hub_files import hash_ahead
from peftcli.schema import Recipe
from peftcli.system import signals
from peftcli.system.outputs import expand_user
from peftcli.train.devices import launch
from peftcli.train.events import OnEvent
from peftcli.train.runs.folder import RunFolder, StartOptions
from peftcli.train.runs.status import read_records, record_failure


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
            _start_processes(recipe, folder, command, count, options.overwrite, tell)
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


def _start_processes(
    recipe: Recipe, folder: RunFolder, command: Sequence[str], count: int, overwrite: bool, tell: OnEvent
) -> None:
    """Lock the run folder, encode the data once, and start ``count`` processes."""
    from peftcli.train import fresh_process
    from peftcli.train.data import prepare_data
    from peftcli.train.devices.machines import run_on_machine

    several, save_on = recipe.launch.num_machines > 1, recipe.training.save_on_signal
    record, is_first = folder.read(), recipe.launch.machine_rank == 0
    if is_first:  # other machines may share the folder
        folder.lock()
    before = read_records(folder)

    def prepare() -> None:
        if overwrite or record is None or record.status != "complete":
            prepare_data(recipe, record.day if record else None, tell)
        if several:
            folder.close()  # process 0 locks it, as often as it is started

    def verify() -> None:
        if several and is_first:
            folder.lock()
        if recipe.training.verify and is_first:
            fresh_process.verify_run(folder.path, tell)

    try:
        if several:
            run_on_machine(
                command,
                count,
                recipe.launch,
                save_on,
                before=prepare,
                afterwards=verify,
                resumable=lambda: (now := folder.read()) is not None and now.resumable,
                tell=tell,
            )
        else:
            prepare()
            port, lock = recipe.launch.main_process_port, folder.give_lock()
            launch.run_processes(command, count, port, lock, save_on, verify)
    except PeftcliError as error:
        if is_first and not isinstance(error, FolderBusy):  # or else it is another run's
            record_failure(folder, error, before)
        raise
    finally:
        folder.close()
