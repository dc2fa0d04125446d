"""Whose a run folder is: a new run's, that of a run to be gone on with, or another run's, which is refused."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from peftcli.data import day
from peftcli.errors import StorageError, UsageError
from peftcli.models import hub_files
from peftcli.recipe import to_dict, to_yaml
from peftcli.schema import BaseModel, Recipe
from peftcli.train.report import OnEvent, Warned, versions
from peftcli.train.runs.checkpoint import checkpoints, damage, newest_whole, prune, read_manifest, tidy
from peftcli.train.runs.folder import SCHEMA_VERSION, RunFolder, refuse_without_product
from peftcli.train.runs.identity import Change, base_hash, changes, check_keys, digests, identity, is_allowed


@dataclass(frozen=True)
class StartOptions:
    """How the command wants to begin."""

    resume: str = "auto"
    """``auto``: go on where there is something to go on with; ``never``: begin anew; ``must``: go on; or the path of a
    checkpoint."""
    allow_change: tuple[str, ...] = ()
    """Keys in which the run may differ from the one in the folder."""
    overwrite: bool = False
    """Whether a complete run of this recipe may take the place of another one."""


@dataclass(frozen=True)
class OpenRun:
    """A run folder that is held."""

    recipe: Recipe
    folder: RunFolder
    run: dict[str, Any]
    """run.json as it stands now."""
    identity: dict[str, Any]
    """That of the run which is asked for."""
    changes: list[Change]
    """In what it differs from the one in the folder, all of it allowed."""
    replaces: RunFolder | None
    """The folder whose run this one will take the place of."""


@contextlib.contextmanager
def open_run(recipe: Recipe, options: StartOptions, accelerator: Accelerator) -> Iterator[OpenRun]:
    """Hold the run folder, and give run.json as it stands now: new, to be gone on with, or complete.

    Raises:
        UsageError: it holds other files, or the run of another recipe, other data, another number of processes.
        FolderBusy: another run holds it.
        StorageError: it cannot be read or written.
    """
    folder = RunFolder(Path(recipe.training.output_dir))
    shared: list[Any] = [None]
    try:
        if accelerator.is_main_process:
            check_keys(options.allow_change, recipe)
            now = identity(recipe, accelerator.num_processes)
            if not folder.is_replacing():
                _choose(folder, now, options)  # refuses before anything is written
            folder.lock()
            folder.finish_replacing()
            chosen, run, changed = _choose(folder, now, options)
            if run is None and chosen.path != folder.path and chosen.path.exists():
                chosen.clear()
            for each in (folder, chosen):
                each.tidy()
                tidy(each.checkpoints)
            if run is None:
                run = _new_run(recipe, now, accelerator)
            elif run["status"] != "complete":
                run["resumable"] = bool(checkpoints(chosen.checkpoints))  # a kill may have come before it was said
                if run["attempts"]:
                    changed = [*changed, *_other_versions(run)]
                else:
                    run["versions"] = versions()
            shared[0] = (chosen.path, run, now, changed)
        broadcast_object_list(shared)
        path, run, now, changed = shared[0]
        replaces = None if path == folder.path else folder
        within = folder if replaces is None else RunFolder(path)
        with contextlib.closing(within):
            yield OpenRun(recipe, within, run, now, changed, replaces)
    finally:
        folder.close()


def _choose(
    folder: RunFolder, now: dict[str, Any], options: StartOptions
) -> tuple[RunFolder, dict[str, Any] | None, list[Change]]:
    """The folder to train in, its run, and in what that differs from the one that is asked for."""
    run = folder.read()
    if not _has_begun(folder, run):
        if options.resume == "must":
            raise StorageError("holds no run to go on with", file=str(folder.path), key="--resume")
        return folder, None, []
    assert run is not None
    changed = changes(run["identity"], now)
    refused = [change for change in changed if not is_allowed(change, options.allow_change)]
    complete = run["status"] == "complete"
    anew = options.resume == "never" and not complete
    if not refused and not anew and not (complete and changed):
        if complete:
            refuse_without_product(folder, run)
        return folder, run, changed
    if options.overwrite:
        new = folder.beside()
        begun = new.read()
        same = begun is not None and _has_begun(new, begun) and not changes(begun["identity"], now)
        return new, begun if same and not anew else None, []
    if anew and not refused:
        raise UsageError(
            "holds a run that can be gone on with; nothing was changed",
            file=str(folder.path),
            key="--resume never",
            hint="leave --resume out to go on; or add --overwrite: the old run is moved aside once the new is complete",
        )
    raise UsageError(
        f"holds {'a complete run' if complete else 'a run'} of another recipe or other data; nothing was changed\n"
        + "\n".join(f"  {change}" for change in (refused or changed)[:8]),
        file=str(folder.path),
        key="training.output_dir",
        hint=_WAYS_OUT if complete else f"{_WAYS_OUT}; to go on all the same: --allow-change {refused[0].key}",
    )


_WAYS_OUT = "choose another training.output_dir; or --overwrite: the old run is moved aside once the new is complete"


def _has_begun(folder: RunFolder, run: dict[str, Any] | None) -> bool:
    """Whether there is something that could be lost: a run which ended before its first step has nothing."""
    return run is not None and bool(run["attempts"] or folder.checkpoints.exists())


def _new_run(recipe: Recipe, now: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "new",
        "exit_code": None,
        "error": None,
        "resumable": False,
        "exact": True,
        "changes": [],
        "processes": accelerator.num_processes,
        "attempts": [],
        "artefacts": [],
        "day": day.today().isoformat(),
        **described(recipe, now),
    }


def described(recipe: Recipe, now: dict[str, Any]) -> dict[str, Any]:
    """What run.json says of the recipe and of what it depends on."""
    base = recipe.base_model
    return {
        "identity": now,
        "recipe": to_dict(recipe),
        "recipe_sha256": hashlib.sha256(to_yaml(recipe).encode()).hexdigest(),
        "base_model": {"name": base.name, "revision": base.revision, "sha256": now["base_model"]},
        "versions": versions(),
        "seeds": {"training": recipe.training.seed},
    }


def _other_versions(run: dict[str, Any]) -> list[Change]:
    """The packages that the run goes on with in another version, with which a result need not be the same."""
    before, now = run["versions"], versions()
    return [Change(f"versions.{name}", before.get(name), now[name]) for name in now if before.get(name) != now[name]]


def at_commit(recipe: Recipe, here: OpenRun) -> Recipe:
    """The recipe with a base model of the hub at the commit at which the run began, whatever is the newest now."""
    base, began = recipe.base_model, here.run["base_model"].get("revision")
    other = any(change.key.startswith("base_model") for change in here.changes)
    if not here.run["attempts"] or other or began in (None, base.revision):
        return recipe
    return replace(recipe, base_model=replace(base, revision=began))


def commit_of(base: BaseModel) -> dict[str, str | None]:
    """For run.json, the commit and the hash of a base model of the hub, which was loaded; nothing of a local one."""
    folder = hub_files.snapshot(base)
    if folder is None:
        return {}
    return {"revision": folder.name, "sha256": base_hash(folder)}


def checkpoint_to_resume(
    here: OpenRun, options: StartOptions, keep: int, accelerator: Accelerator, tell: OnEvent
) -> Path | None:
    """The checkpoint to go on from, agreed by all processes; None: from the start.

    Raises:
        UsageError: the chosen one is another run's.
        StorageError: it is damaged; or there is none, and there must be.
    """
    found: list[Any] = [None]
    if accelerator.is_main_process:
        if options.resume in ("auto", "must", "never"):
            found[0] = newest_whole(here.folder.checkpoints, lambda text: tell(Warned(text)))
            prune(here.folder.checkpoints, keep)  # a kill may have left one more
            if options.resume == "must" and found[0] is None:
                raise StorageError("no whole checkpoint", file=str(here.folder.checkpoints), key="--resume must")
        else:
            found[0] = _chosen(Path(options.resume), here, options)
    broadcast_object_list(found)
    checkpoint = found[0]
    assert checkpoint is None or isinstance(checkpoint, Path)
    return checkpoint


def _chosen(path: Path, here: OpenRun, options: StartOptions) -> Path:
    if not path.is_dir():
        hint = "auto, must, never, or the folder of a checkpoint"
        raise UsageError("no such checkpoint", file=str(path), key="--resume", hint=hint)
    if reason := damage(path):
        raise StorageError(f"damaged checkpoint: {reason}", file=str(path))
    manifest, wanted = read_manifest(path), dict[str, Any](digests(here.run["identity"]))
    wanted["processes"], manifest["processes"] = here.run["identity"]["processes"], manifest.get("num_processes")
    other = [
        Change(name.removesuffix("_sha256"), manifest.get(name), value)
        for name, value in wanted.items()
        if manifest.get(name) != value
    ]
    names = [change.key for change in other]
    if not set(names) <= set(options.allow_change):
        raise UsageError(
            f"was written with another {' and another '.join(names)}",
            file=str(path),
            key="--resume",
            hint=f"to go on all the same: {' '.join(f'--allow-change {name}' for name in names)}",
        )
    here.changes.extend(other)
    return path
