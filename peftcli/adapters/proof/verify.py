"""Compare an adapter folder with the model that was trained: what the folder holds, and what the model says.

At its end, training writes verification.json: a few rows, what the model in memory says of them, and a hash of each of
its tensors. ``verify_adapter`` loads the folder as it would be after a push, and compares.
"""

from __future__ import annotations

import base64
import datetime
import json
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict, get_args

import torch
from torch import nn

from peftcli.adapters.generate import load_for_task, ready
from peftcli.adapters.load import SHARED_FILES, AdapterSource, find_adapter, read_settings
from peftcli.adapters.merge import open_trained_base
from peftcli.adapters.proof.readers import compare_reader, require_readers
from peftcli.adapters.proof.sketches import Sketch, difference, hash_of, sketch
from peftcli.core.config import AdapterConfig
from peftcli.core.files import CONFIG_FILE, WEIGHTS_FILE, read_tensors
from peftcli.core.protocols import describe
from peftcli.data.rows import Place, Row, Table
from peftcli.data.sources import open_source
from peftcli.data.store import Example, Outcome
from peftcli.errors import AdapterError, DataError, HubError, ModelError, NetworkError, PeftcliError, UsageError
from peftcli.guard.adapter_folder import read_config
from peftcli.guard.files import read_json_object, short_repr
from peftcli.guard.typed_fields import fits, hints_of
from peftcli.models.hub_files import base_hash
from peftcli.models.open import OpenBase
from peftcli.schema import Format, Source
from peftcli.system import date
from peftcli.system.disk import sha256, write_file
from peftcli.system.secrets import redact_values
from peftcli.tasks import TASK_FILE, TASKS
from peftcli.tasks.base import Batch, Probes, Task, facts_of_processor
from peftcli.tasks.scores import scores_on
from peftcli.tasks.settings import CODE
from peftcli.tasks.text.fast.norms import fuse_norms
from peftcli.tasks.text.fast.unpadded import unpad

RECORD_FILE = "verification.json"
"""Beside an adapter that was trained here; not pushed, since it holds rows of the data."""
_VERSION = 3
_ROWS, _LOOKED_AT = 4, 16
"""The rows that are kept are the smallest of the first ones."""
_MAX_ROWS = 4_000_000
"""Bytes of the rows."""
_MAX_RECORD = 64_000_000
"""Bytes. The record of an adapter of 10,000 tensors takes 2,000,000."""
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.3, "float16": 0.03}
"""Largest difference of the model's outputs, as a share of their deviation, that rounding explains, which another
version of peftcli or torch may do in another order. Seen in bfloat16, of a model of 30 layers whose norms round once
instead of twice: 0.22; of half the adapter's strength, 0.57."""
_ELSEWHERE = 0.002
"""The same for another kind of device."""
_BYTES = "bytes in base64"
_HINT = "delete the file, and compare the adapter with PEFT: --with peft"


class _Source(TypedDict):
    """What a ``Table`` says of the rows' source."""

    train: str
    format: Format
    columns: dict[str, str | list[str]]


class Rows(TypedDict):
    """Rows as JSON."""

    source: _Source
    columns: list[str]
    class_names: dict[str, list[str]]
    day: str | None
    values: list[dict[str, Any]]
    folders: list[str]
    """The folder of each row, to which paths in it are relative."""


class _Base(TypedDict):
    """The base model."""

    sha256: str | None


class _Record(TypedDict):
    """What verification.json holds."""

    task: dict[str, Any]
    """The task's settings beside its type."""
    config: dict[str, Any]
    tensors: dict[str, str]
    files: dict[str, str]
    processor: dict[str, Any]
    base_model: _Base
    device: str
    dtype: str
    bf16: bool
    rows: Rows | None
    probe: Sketch | None


class _RecordWithRows(_Record):
    """The same where rows were kept."""

    inputs: dict[str, Sketch]
    scores: Sketch


# --- what training records --------------------------------------------------------------------------------------------


def sample_rows(task: Task[Any], source: Source, day: str | None) -> Rows | None:
    """Choose a few rows of a source, the smallest of the first ones; None where none can be kept.

    ``source`` has rows that the model was not trained on, if there are such; ``day`` is what chat templates write.
    """
    try:
        opened = open_source(source)
        found = [row for row in islice(opened.rows(), _LOOKED_AT) if isinstance(row, Row)]
        rows: Rows = {
            "source": {"train": opened.name, "format": source.format, "columns": dict(source.columns)},
            "columns": list(dict.fromkeys(name for row in found for name in row.values)),
            "class_names": {name: list(names) for name, names in opened.class_names().items()},
            "day": day,
            "values": [],
            "folders": [],
        }
    except (DataError, HubError, NetworkError):  # a source that cannot be read again
        return None
    sizes = dict[int, int]()
    for at, row in enumerate(found):
        with suppress(DataError, TypeError):  # a bad row, which training has skipped; values of other types
            rows["values"], rows["folders"] = [_to_json(row.values)], [str(row.folder)]
            if len(json.dumps(rows["values"])) <= _MAX_ROWS // _ROWS and (examples := _examples(task, rows)):
                sizes[at] = sum(each.size for each in examples)
    chosen = sorted(sorted(sizes, key=lambda at: sizes[at])[:_ROWS])
    rows["values"] = [_to_json(found[at].values) for at in chosen]
    rows["folders"] = [str(found[at].folder) for at in chosen]
    return rows if chosen else None


def trained_outputs(model: nn.Module, task: Task[Any], rows: Rows | None, *, bf16: bool) -> dict[str, Any]:
    """Return what a trained model says of rows, and of what the task asks besides, for ``record_model``."""
    values: dict[str, Any] = {"rows": rows}
    if rows:
        inputs = _batch(task, rows)
        made = {name: value for name, value in sorted(inputs.items()) if isinstance(value, torch.Tensor)}
        values["inputs"] = {name: sketch(value) for name, value in made.items()}
        values["scores"] = sketch(scores_on(model, inputs, bf16=bf16))
    if isinstance(task, Probes):
        values["probe"] = sketch(scores_on(model, task.probe(), bf16=bf16))
    return values


def record_model(
    folder: Path,
    model: nn.Module,
    config: AdapterConfig,
    tensors: Mapping[str, torch.Tensor],
    task: Task[Any],
    described: Mapping[str, Any],
    said: Mapping[str, Any],
    *,
    files: Sequence[str],
    dtype: torch.dtype,
    bf16: bool,
    base_sha256: str | None,
) -> None:
    """Write what a trained model is and says, for ``verify_adapter``.

    ``described`` has the task's ``type`` and settings. ``said`` is from ``trained_outputs``; empty where the model
    cannot be asked. ``files`` are the names of those that the task keeps in the folder.
    """
    values = {
        "schema_version": _VERSION,
        "task": {name: value for name, value in described.items() if name not in CODE},
        "config": {**describe(config, tensors), "inference_mode": True},
        "tensors": {name: hash_of(value) for name, value in sorted(tensors.items())},
        "files": {name: sha256(folder / name) for name in files},
        "processor": facts_of_processor(task.processor),
        "base_model": {"sha256": base_sha256},
        "device": next(model.parameters()).device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "bf16": bf16,
        "rows": None,
        "probe": None,
        **said,
    }
    write_file(folder / RECORD_FILE, (json.dumps(redact_values(values), indent=1) + "\n").encode())


def mark_verified(folder: Path) -> None:
    """Note in the record that it was compared with the folder, and is the same."""
    write_file(folder / RECORD_FILE, (json.dumps({**_read_record(folder), "verified": True}, indent=1) + "\n").encode())


def needs_verification(folder: Path) -> bool:
    """Return whether a folder has a record that was never found to be the same."""
    return (folder / RECORD_FILE).is_file() and not _read_record(folder).get("verified")


# --- the comparison ---------------------------------------------------------------------------------------------------


def verify_adapter(
    name: str, base: str | None = None, readers: Sequence[str] = (), tell: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Load an adapter folder, and compare it with the model that was trained.

    ``readers`` are those of ``READERS`` that load it too, to be compared with peftcli. ``tell`` is told what could not
    be compared.

    Returns:
        What was compared: ``rows``, ``tensors``, ``difference``, ``allowed``, and the difference of each reader.

    Raises:
        AdapterError: the folder is not the model; names the file, and the tensor or the key in it, that is to blame.
        ModelError: the base model is another one, or cannot be loaded.
        UsageError: there is nothing to compare with, or a reader is not installed.
    """
    require_readers(readers)
    source = find_adapter(name, base)
    recorded = _read_record(source.folder) if (source.folder / RECORD_FILE).is_file() else {}
    if not recorded and not readers:
        hint = "peftcli train writes it; --with peft compares peftcli with PEFT instead"
        raise UsageError(f"has no {RECORD_FILE}: nothing says what the trained model was", file=name, hint=hint)
    with _as_pushed(source) as pushed:
        if recorded:
            _compare_files(pushed, recorded)
        with open_trained_base(source, processors=pushed.folder) as opened:
            task = _open_task(pushed, opened, recorded)
            dtype = getattr(torch, recorded.get("dtype", "float32"))
            model = ready(load_for_task(pushed, opened, task, dtype))
    fuse_norms(model)  # as in training, or bfloat16 rounds otherwise
    unpad(model, source.config, probe=task.padded_probe(model))
    result: dict[str, Any] = {
        "adapter": name,
        "tensors": len(recorded.get("tensors", {})),
        "rows": len((recorded.get("rows") or {}).get("values", ())),
        "difference": None,
        "allowed": None,
        "readers": {},
    }
    if recorded:
        allowed = _TOLERANCE["bfloat16" if recorded["bf16"] else recorded["dtype"]]
        allowed = allowed if model.device.type == recorded["device"] else max(allowed, _ELSEWHERE)
        inputs = None
        try:
            inputs = _batch(task, recorded["rows"]) if recorded["rows"] else None
        except DataError as error:  # of a picture or sound that is gone
            tell(f"the rows cannot be compared: {error}")
        result["rows"] *= inputs is not None
        result["allowed"] = allowed
        result["difference"] = _compare_model(source, opened, model, task, recorded, inputs, allowed)
    if readers and any(each.dtype != torch.float32 for each in model.parameters()):
        # readers round an adapter's weights to half precision where the base model is in it
        model = ready(load_for_task(source, opened, task, torch.float32))
    for reader in readers:
        result["readers"][reader] = compare_reader(reader, source, opened, task, model)
    return result


@contextmanager
def _as_pushed(source: AdapterSource) -> Iterator[AdapterSource]:
    """Yield the adapter in a folder that has only the files that are pushed. Errors inside name its own folder."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in SHARED_FILES:
            if os.path.lexists(there := source.folder / name):
                (link := Path(scratch) / name).parent.mkdir(exist_ok=True)
                link.symlink_to(there.absolute())
        try:
            yield AdapterSource(Path(scratch), read_config(Path(scratch)), source.base_name)
        except PeftcliError as error:
            for name in ("message", "file", "hint"):
                if text := getattr(error, name):
                    setattr(error, name, text.replace(scratch, str(source.folder)))
            raise


def _compare_files(source: AdapterSource, recorded: Mapping[str, Any]) -> None:
    """Raise AdapterError where config, tensors or the task's files differ from those of the trained model."""
    folder = source.folder
    now, then = redact_values(source.values), recorded["config"]
    replaced = {"base_model_name_or_path", "revision"} if source.base_name else set[str]()
    _refuse_difference(now, then, str(folder / CONFIG_FILE), without=replaced)
    for name, digest in recorded["files"].items():
        if not (folder / name).is_file():
            raise AdapterError("is missing; training wrote it", file=str(folder / name))
        if name == TASK_FILE and "settings" in source.task_values:
            values = {"type": source.task_values.get("type"), **source.task_values.get("settings", {})}
            _refuse_difference(values, recorded["task"], str(folder / TASK_FILE))
        if sha256(folder / name) != digest:
            raise AdapterError("is not the file that training wrote", file=str(folder / name))
    tensors = {name: hash_of(value) for name, value in read_tensors(folder).items()}
    wrong = [f"missing: {name}" for name in recorded["tensors"] if name not in tensors]
    wrong += [f"not of the trained model: {name}" for name in tensors if name not in recorded["tensors"]]
    wrong += [
        f"differs from the trained one: {name}"
        for name, digest in recorded["tensors"].items()
        if name in tensors and tensors[name] != digest
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise AdapterError(wrong[0] + more, file=str(folder / WEIGHTS_FILE))


def _refuse_difference(
    now: Mapping[str, Any], then: Mapping[str, Any], file: str, without: Collection[str] = ()
) -> None:
    """Raise AdapterError for the first key whose value is not that of training."""
    for key in sorted((now.keys() | then.keys()) - set(without)):
        if now.get(key) != then.get(key):
            message = f"is {now.get(key)!r:.100}; in training it was {then.get(key)!r:.100}"
            raise AdapterError(message, file=file, key=key)


def _open_task(source: AdapterSource, opened: OpenBase, recorded: Mapping[str, Any]) -> Task[Any]:
    """Open the adapter's task, with the settings of training where these are known."""
    if recorded:
        settings = dict(recorded["task"])
        row = TASKS[settings.pop("type")]
        return row.open(row.settings(**settings), opened, source.config)
    task = source.open_task(opened)
    if task is None:
        raise UsageError("the adapter's task is not known", file=str(source.folder))
    return task


def _compare_model(
    source: AdapterSource,
    opened: OpenBase,
    model: nn.Module,
    task: Task[Any],
    recorded: Mapping[str, Any],
    inputs: Batch | None,
    allowed: float,
) -> float | None:
    """Compare what a model says, and the inputs that its processor makes, with what was recorded.

    Returns:
        The largest difference of the outputs, as a share of their deviation; None where none were recorded.
    """
    own = sorted(name for name in recorded["files"] if name != TASK_FILE)
    made_by = f"{source.folder}: {', '.join(own)}" if own else opened.name
    _refuse_difference(facts_of_processor(task.processor), recorded["processor"], made_by)
    found = list[float]()
    if inputs is not None:
        for name, expected in recorded["inputs"].items():
            if name not in inputs or not difference(sketch(inputs[name]), expected) <= _TOLERANCE["float32"]:
                raise AdapterError(f"makes other inputs of the rows of training: {name} differs", file=made_by)
        found.append(difference(sketch(scores_on(model, inputs, bf16=recorded["bf16"])), recorded["scores"]))
    if recorded["probe"] and isinstance(task, Probes):
        found.append(difference(sketch(scores_on(model, task.probe(), bf16=recorded["bf16"])), recorded["probe"]))
    largest = max(found, default=None)
    if largest is None or largest <= allowed:
        return largest
    what = f"the outputs differ by {largest:.2g} of their deviation from those of the trained model"
    before = recorded["base_model"]["sha256"]
    if before is not None and base_hash(Path(opened.folder)) != before:
        raise ModelError(f"is not the base model of training: {what}", file=opened.name, key="base_model")
    raise AdapterError(f"{what}, with the same tensors and config", file=str(source.folder))


# --- rows as JSON -----------------------------------------------------------------------------------------------------


def _examples(task: Task[Any], rows: Rows) -> list[Example]:
    """Encode rows; of one that the task leaves out there are no examples."""
    of, values = rows["source"], [_from_json(each) for each in rows["values"]]
    source = Source(train=of["train"], format=of["format"], columns=of["columns"])
    classes = {name: tuple(names) for name, names in rows["class_names"].items()}
    table = Table(source, source.train, tuple(rows["columns"]), lambda: classes, values[0])
    read = enumerate(zip(values, map(Path, rows["folders"]), strict=True), start=1)
    given = [Row(each, Place(source.train, number), folder) for number, (each, folder) in read]
    examples = list[Example]()
    with date.fixed_date(rows["day"]):
        for outcome in task.encode(given, task.read(table)):
            if isinstance(outcome, DataError):
                raise outcome
            assert isinstance(outcome, Outcome)
            examples += outcome.examples
    return examples


def _batch(task: Task[Any], rows: Rows) -> Batch:
    """Return the batch that a task makes of rows."""
    return task.collate(_examples(task, rows), training=False)


def _to_json(value: Any) -> Any:
    """Raise TypeError for a value that JSON cannot hold."""
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        return {str(key): _to_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(inner) for inner in value]
    if value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return redact_values(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_BYTES}:
            return base64.b64decode(value[_BYTES])
        return {key: _from_json(inner) for key, inner in value.items()}
    return [_from_json(inner) for inner in value] if isinstance(value, list) else value


def _unreadable(rows: Rows) -> dict[str, Any]:
    """Return what of the rows cannot be read, by its key in the record."""
    found: dict[str, Any] = {} if rows["values"] else {"rows.values": []}
    if len(rows["folders"]) != len(rows["values"]):
        found["rows.folders"] = rows["folders"]
    parts: list[tuple[str, Callable[[Any], Any], Any]]
    parts = [("rows.source.format", get_args(Format).index, rows["source"]["format"])]
    parts += [("rows.day", datetime.date.fromisoformat, rows["day"] or "2026-01-31")]
    parts += [(f"rows.values.{at}", _from_json, each) for at, each in enumerate(rows["values"])]
    for key, read, value in parts:
        try:
            read(value)
        except (TypeError, ValueError):
            found[key] = value
    return found


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD_FILE
    values = read_json_object(path, _MAX_RECORD)
    rows = values.get("rows")
    if values.get("schema_version") == 2 and isinstance(rows, dict) and isinstance(rows.get("values"), list):
        values["schema_version"], rows["folders"] = _VERSION, [""] * len(rows["values"])  # it had no folders
    if values.get("schema_version") not in (2, _VERSION):
        raise AdapterError("was written by another version", file=str(path), key="schema_version", hint=_HINT)
    kinds = hints_of(_RecordWithRows if values.get("rows") else _Record)
    wrong = [key for key, kind in kinds.items() if key not in values or not fits(values[key], kind)]
    if not wrong and str(values["task"].get("type")) not in TASKS:
        wrong = ["task"]
    if not wrong and values["dtype"] not in _TOLERANCE:
        wrong = ["dtype"]
    found = {key: values.get(key) for key in wrong}
    if not found and values["rows"]:
        found = _unreadable(values["rows"])
    for key, value in found.items():
        message = f"is nothing that training writes: {short_repr(value)}"
        raise AdapterError(message, file=str(path), key=key, hint=_HINT)
    values["task"] = {name: value for name, value in values["task"].items() if name not in CODE}  # once recorded
    settings = dict(values["task"])
    read_settings(settings.pop("type"), settings, str(path), "task")
    return values
