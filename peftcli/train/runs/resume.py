"""Open a run: decide what the output folder holds (nothing, a run to resume, or another run, which is refused)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from peftcli.core.protocols import layers_of
from peftcli.errors import StorageError, UsageError
from peftcli.guard.files import command_word
from peftcli.models import hub_files
from peftcli.recipe import to_dict, to_yaml
from peftcli.schema import BaseModel, Dataset, Recipe, Source
from peftcli.system import date
from peftcli.system.signals import Stop
from peftcli.train.events import OnEvent, warning
from peftcli.train.loop import PreparedModel
from peftcli.train.runs.checkpoint import (
    OTHER_VERSION,
    Misfit,
    Progress,
    State,
    find_damage,
    load_checkpoint,
    newest_whole,
    prune,
    read_manifest,
    tidy,
)
from peftcli.train.runs.folder import RESUME_MODES, RunFolder, StartOptions, checkpoints, refuse_without_product
from peftcli.train.runs.identity import Change, changes, check_keys, digests, identity, is_allowed
from peftcli.train.runs.record import (
    AccountRecord,
    BaseModelRecord,
    ChangeRecord,
    IdentityRecord,
    RunRecord,
    SeedsRecord,
)
from peftcli.train.runs.typed_json import Missing, WrongValue


@dataclass(frozen=True)
class Run:
    """A run in progress, whose folder is locked."""

    recipe: Recipe
    pinned: Recipe
    """The recipe with a base model and datasets of the hub at the commits that the run began with."""
    options: StartOptions
    folder: RunFolder
    record: RunRecord
    """run.json as it is now."""
    identity: IdentityRecord
    """The identity of this recipe, data and base model, which may differ from the recorded one."""
    changes: list[Change]
    """How it differs from the recorded one, all of it allowed."""
    replaces: RunFolder | None
    """The folder whose run this one will replace when it is complete."""
    accelerator: Accelerator
    stop: Stop
    tell: OnEvent
    """Receives the events of the run; in the main process only."""

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, the only one that writes to the folder."""
        return self.accelerator.is_main_process

    def write_record(self) -> None:
        """Write run.json."""
        if self.is_main:
            self.folder.write(self.record)

    def warn(self, text: str) -> None:
        """Tell the user something that stops nothing."""
        self.tell(warning(text))

    def apply_changes(self, step: int) -> None:
        """Record the recipe of this attempt, and the allowed changes, which hold from after ``step``.

        From the start, this recipe is the only one.
        """
        for name, value in _description(self.recipe, self.identity).items():
            setattr(self.record, name, value)
        if not step:
            self.record.changes, self.record.exact = [], True
        for change in self.changes if step else ():
            self.warn(f"{change}, since step {step}: the result is not exactly that of one recipe")
            self.record.changes.append(ChangeRecord(**asdict(change), step=step))
            self.record.exact = False
        self.record.processes = self.accelerator.num_processes


@contextlib.contextmanager
def open_run(
    recipe: Recipe, options: StartOptions, accelerator: Accelerator, stop: Stop, tell: OnEvent
) -> Iterator[Run]:
    """Lock the run folder, and give its run: a new one, one to resume, or a complete one.

    Raises:
        UsageError: it holds other files, or the run of another recipe, other data, another number of processes.
        FolderBusy: another run holds it.
        StorageError: it cannot be read or written.
    """
    folder = RunFolder(Path(recipe.training.output_dir))
    shared: Any = None
    try:
        if accelerator.is_main_process:
            shared = _lock_and_choose(folder, recipe, options, accelerator, tell)
        ((path, record, now, changed),) = broadcast_object_list([shared])
        replaces = None if path == folder.path else folder
        within = folder if replaces is None else RunFolder(path)
        pinned = _pinned(recipe, record, changed)
        with contextlib.closing(within):
            yield Run(recipe, pinned, options, within, record, now, changed, replaces, accelerator, stop, tell)
    finally:
        folder.close()


def _lock_and_choose(
    folder: RunFolder, recipe: Recipe, options: StartOptions, accelerator: Accelerator, tell: OnEvent
) -> tuple[Path, RunRecord, IdentityRecord, list[Change]]:
    """Lock the run folder, and choose its run: return where it is, its record, and how this recipe differs from it."""
    check_keys(options.allow_change, recipe)
    if options.resume not in RESUME_MODES and not Path(options.resume).is_dir():
        hint = f"{', '.join(RESUME_MODES)}, or the folder of a checkpoint"
        raise UsageError("no such checkpoint", file=options.resume, key="--resume", hint=hint)
    now = identity(recipe, accelerator.num_processes)
    if not folder.is_replacing():
        _choose(folder, now, options)  # refuses before anything is written
    folder.lock()
    folder.finish_replacing()
    chosen, record, changed = _choose(folder, now, options)
    if record is None and chosen.path != folder.path and chosen.path.exists():
        if (begun := chosen.read()) is not None and begun.steps and begun.steps.done:
            tell(warning(f"another run that was to replace it, stopped after step {begun.steps.done}, is gone"))
        chosen.clear()
    for each in (folder, chosen):
        each.tidy()
        tidy(each.checkpoints)
    if record is None:
        record = RunRecord(
            status="running",
            exit_code=None,
            error=None,
            resumable=False,
            exact=True,
            changes=[],
            processes=accelerator.num_processes,
            attempts=[],
            artefacts=[],
            day=date.today().isoformat(),
            **_description(recipe, now),
        )
    elif record.status != "complete":
        # a kill may have come before this was recorded
        record.resumable = bool(checkpoints(chosen.checkpoints))
    if record.status != "complete":
        if options.resume not in RESUME_MODES:
            changed += _take_checkpoint(Path(options.resume), record, options)
        if record.data:
            changed += _environment_changes(record, accelerator)
        else:
            record.versions = versions()
    return chosen.path, record, now, changed


def _environment_changes(record: RunRecord, accelerator: Accelerator) -> list[Change]:
    """How packages and device differ from those that the run began with: with others the result may differ."""
    packages = {f"versions.{name}": (record.versions.get(name), now) for name, now in versions().items()}
    bf16 = accelerator.mixed_precision == "bf16"
    device = {"device": (record.device, accelerator.device.type), "bf16": (record.bf16, bf16)}
    both = (packages | device).items()
    return [Change(key, began, now) for key, (began, now) in both if began != now and not isinstance(began, Missing)]


def _choose(
    folder: RunFolder, now: IdentityRecord, options: StartOptions
) -> tuple[RunFolder, RunRecord | None, list[Change]]:
    """The folder to train in, its record, and how that differs from ``now``."""
    record = folder.read()
    if not has_begun(folder, record):
        if options.resume == "must":
            raise StorageError("holds no run to resume", file=str(folder.path), key="--resume")
        return folder, None, []
    assert record is not None
    changed = changes(record.identity, now)
    refused = [change for change in changed if not is_allowed(change, options.allow_change)]
    complete = record.status == "complete"
    anew = options.resume == "never" and not complete
    if not refused and not anew and not (complete and changed):
        if complete:
            refuse_without_product(folder, record)
        return folder, record, changed
    if options.overwrite:
        new = folder.replacement()
        begun = new.read()
        same = begun is not None and has_begun(new, begun) and not changes(begun.identity, now)
        return new, begun if same and not anew else None, []
    if anew and not refused:
        raise UsageError(
            "holds a run that can be resumed; nothing was changed",
            file=str(folder.path),
            key="--resume never",
            hint="leave --resume out to resume it; or add --overwrite: the old run is moved aside once the new one is "
            "complete",
        )
    differing = refused or changed
    shown = [f"  {change}" for change in differing[:_SHOWN]]
    if len(differing) > _SHOWN:
        shown.append(f"  and {len(differing) - _SHOWN} more")
    start = f"training.init_adapter_from={command_word(str(folder.path))} and another training.output_dir"
    hint = f"to train on from its adapter, set {start}; to train anew, {_WAYS_OUT}" if complete else _WAYS_OUT
    if not complete and not any(change.is_final for change in refused):
        keys = dict.fromkeys("data" if change.key.startswith("data.") else change.key for change in refused)
        hint += f"; to resume it anyway: {' '.join(f'--allow-change {key}' for key in keys)}"
    raise UsageError(
        f"holds {'a complete run' if complete else 'a run'} of another recipe or other data; nothing was changed\n"
        + "\n".join(shown),
        file=str(folder.path),
        key="training.output_dir",
        hint=hint,
    )


_SHOWN = 3
"""Differences that a refusal shows."""
_WAYS_OUT = "choose another training.output_dir; or --overwrite: the old run is moved aside once the new is complete"


def has_begun(folder: RunFolder, record: RunRecord | None) -> bool:
    """Whether there is something to lose. A run that ended before its first step has nothing."""
    return record is not None and bool(record.attempts or folder.checkpoints.exists())


_PACKAGES = ("peftcli", "torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


_version = functools.cache(version)  # which reads a file each time


def _description(recipe: Recipe, now: IdentityRecord) -> dict[str, Any]:
    """The fields of a RunRecord that describe the recipe and what it depends on."""
    base = recipe.base_model
    return {
        "identity": now,
        "recipe": to_dict(recipe),
        "recipe_sha256": hashlib.sha256(to_yaml(recipe).encode()).hexdigest(),
        "base_model": BaseModelRecord(name=base.name, revision=base.revision, sha256=now.base_model),
        "versions": versions(),
        "seeds": SeedsRecord(training=recipe.training.seed),
    }


def _pinned(recipe: Recipe, record: RunRecord, changed: list[Change]) -> Recipe:
    """The recipe with what is on the hub at the commits that the run began with, whatever is the newest now."""
    keys = {change.key for change in changed}
    if not record.data or ("recipe" in keys and not record.attempts):  # of a checkpoint whose recipe is not known
        return recipe
    base, data, began = recipe.base_model, recipe.dataset, record.base_model.revision
    if began is not None and not keys & {"base_model", "base_model.name", "base_model.revision"}:
        base = replace(base, revision=began)
    if not any(key.startswith(("dataset.train", "dataset.mix", "dataset.revision")) for key in keys):
        read = zip(data.mix, record.data.sources if len(data.mix) > 1 else [record.data] * len(data.mix), strict=True)
        mix = [replace(each, revision=_commit_read(each, account)) for each, account in read]
        data = replace(data, mix=mix, revision=_commit_read(data, record.data))
    return replace(recipe, base_model=base, dataset=data)


def _commit_read(source: Dataset | Source, account: AccountRecord) -> str | None:
    """The commit at which a dataset of the hub was read, by the record of it; of a local one, the recipe's revision."""
    commits = (value for name, value in account.sha256.items() if name == f"{source.train}@{value}")
    return next(commits, source.revision)


def commit_of(base: BaseModel) -> dict[str, str | None]:
    """The fields of a BaseModelRecord that say which commit of the hub was loaded; empty for a local base model."""
    folder = hub_files.snapshot(base)
    if folder is None:
        return {}
    return {"revision": folder.name, "sha256": hub_files.base_hash(folder)}


@contextlib.contextmanager
def checkpoint_to_resume(run: Run) -> Iterator[Path | None]:
    """The checkpoint to resume from, agreed by all processes; None: start from the beginning.

    Inside, each process sees it, also on a machine that does not see the run folder.
    """
    checkpoint: Path | None = None
    if run.is_main:
        resume, folder = run.options.resume, run.folder.checkpoints
        if resume in RESUME_MODES:
            checkpoint = newest_whole(folder, run.warn)
            prune(folder, run.recipe.training.save_total_limit)  # a kill may have left one more
            if resume == "must" and checkpoint is None:
                raise StorageError("no whole checkpoint", file=str(folder), key="--resume must")
        else:
            checkpoint = Path(resume)
    (checkpoint,) = broadcast_object_list([checkpoint])
    if checkpoint is None or len({*gather_object([_seal(checkpoint)])}) == 1:
        yield checkpoint
        return
    (names,) = broadcast_object_list([[path.name for path in checkpoint.iterdir()] if run.is_main else []])
    with tempfile.TemporaryDirectory(prefix="peftcli-") as temporary:
        copy = Path(temporary) / checkpoint.name
        copy.mkdir()
        for name in names:
            (content,) = broadcast_object_list([(checkpoint / name).read_bytes() if run.is_main else b""])
            (copy / name).write_bytes(content)
        yield copy


def _seal(checkpoint: Path) -> str | None:
    """The hash of a checkpoint's manifest, which no other checkpoint has; None if this process sees no checkpoint."""
    try:
        return str(read_manifest(checkpoint)["manifest_sha256"])
    except (OSError, ValueError):
        return None


_BEGAN_WITH = ("day", "versions", "data", "base_model", "device", "bf16", "threads")
"""Fields of a RunRecord with what a run began with, beside its recipe."""


def _take_checkpoint(path: Path, record: RunRecord, options: StartOptions) -> list[Change]:
    """Take over what the checkpoint to resume from says of its run; return how that differs, all of it allowed."""
    if reason := find_damage(path):
        raise StorageError(f"damaged checkpoint: {reason}", file=str(path))
    recorded = record.identity
    manifest, wanted = read_manifest(path), dict[str, Any](digests(recorded))
    wanted["processes"], manifest["processes"] = recorded.processes, manifest.get("num_processes")
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
            hint=f"to resume it anyway: {' '.join(f'--allow-change {name}' for name in names)}",
        )
    if "run" in manifest:  # one of an older version has none
        try:
            began = RunRecord.read(manifest["run"])
        except WrongValue as error:
            what = f"was written by another version of peftcli: {error}"
            raise StorageError(what, file=str(path), hint=OTHER_VERSION) from None
        record.changes += [change for change in began.changes if change not in record.changes]
        record.exact = record.exact and began.exact
        for name in _BEGAN_WITH if not record.attempts else ():
            setattr(record, name, getattr(began, name))
    return other


def resume_state(run: Run, prepared: PreparedModel, total: int) -> State:
    """The state of training, of ``total`` steps: from the newest whole checkpoint, or from the start.

    Raises:
        UsageError: the run has more steps done than the recipe wants.
        StorageError: the checkpoint does not fit.
    """
    state = State(prepared, run.accelerator.unwrap_model(prepared.model), Progress())
    with checkpoint_to_resume(run) as checkpoint:
        if checkpoint is None:
            return state
        prepared.gather_parameters()
        try:
            load_checkpoint(checkpoint, state, run.accelerator)
        except Misfit as error:
            if not any(is_allowed(change, run.options.allow_change) for change in run.changes):
                raise
            hint = "undo the changes that were allowed; or choose another training.output_dir"
            raise UsageError(error.message, file=error.file, key="--allow-change", hint=hint) from None
    _drop_outdated(run, state)
    progress = state.progress
    if progress.step > total:
        message = f"the run has done {progress.step} steps, and the recipe now wants {total}"
        raise UsageError(message, key="training.max_steps")
    layers_of(prepared.config).after_resume(state.model, prepared.config, progress.step, total)
    if progress.step == total and progress.pending is None:
        # before, an earlier step than the last one
        progress.pending = next((line for line in run.folder.metrics() if line["step"] == total), {})
    return state


_MEASURED = ("base_model", "task", "method", "dataset", "data", "recipe")
"""Keys and sections on which the metrics of an adapter depend."""
_CHOOSING = ("training.metric_for_best_model", "training.greater_is_better")
"""Keys on which it depends which of two adapters is better."""


def _drop_outdated(run: Run, state: State) -> None:
    """Drop what a change has made outdated: the metrics before training, and the best adapter so far.

    The best adapter is also dropped where the recipe does not keep it, or compares by another metric now.
    """
    progress, wanted = state.progress, run.recipe.training.load_best_model_at_end
    if not wanted:
        state.best_adapter = None
    # changes after the checkpoint, also those of an attempt that was killed before it saved one
    recorded = [each for each in run.record.changes if each.step >= progress.step]
    differing = [*run.changes, *(Change(each.key, each.before, each.now) for each in recorded)]
    if any(is_allowed(each, _MEASURED) for each in differing):
        progress.first_eval = {}
    keys = [each.key for each in differing if is_allowed(each, (*_MEASURED, *_CHOOSING))]
    if wanted and state.best_adapter is None:
        keys.append("training.load_best_model_at_end")
    if keys and progress.best_eval:
        best = f"the best evaluation so far, after step {progress.best_step}"
        run.warn(f"{keys[0]} has changed: {best}, no longer counts")
        state.best_adapter, progress.best_eval, progress.best_step, progress.no_better = None, {}, -1, 0
