"""Start the processes of a run on this machine, around them what is done once: the lock, the data, the verification."""

from __future__ import annotations

from collections.abc import Sequence

from peftcli.errors import FolderBusy, PeftcliError
from peftcli.schema import Recipe
from peftcli.train.data import prepare_data
from peftcli.train.devices.launch import run_processes
from peftcli.train.devices.machines import run_on_machine
from peftcli.train.events import OnEvent
from peftcli.train.fresh_process import verify_run
from peftcli.train.runs.folder import RunFolder
from peftcli.train.runs.status import read_records, record_failure


def start_processes(
    recipe: Recipe, folder: RunFolder, command: Sequence[str], count: int, overwrite: bool, tell: OnEvent
) -> None:
    """Lock the run folder, encode the data once, and start ``count`` processes."""
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
            verify_run(folder.path, tell)

    def resumable() -> bool:
        now = folder.read()
        return now is not None and now.resumable

    try:
        if several:
            run_on_machine(
                command,
                count,
                recipe.launch,
                save_on,
                before=prepare,
                afterwards=verify,
                resumable=resumable,
                tell=tell,
            )
        else:
            prepare()
            port, lock = recipe.launch.main_process_port, folder.give_lock()
            run_processes(command, count, port, lock, save_on, verify)
    except PeftcliError as error:
        if is_first and not isinstance(error, FolderBusy):  # or else it is another run's
            record_failure(folder, error, before)
        raise
    finally:
        folder.close()
