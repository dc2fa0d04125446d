"""What an adapter's name stands for: its folder, config, run record, base model and task.

Nothing else turns the name of an adapter, a folder or a hub id, into things.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.core.protocols import NamesAdapters
from peftcli.errors import AdapterError
from peftcli.guard.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, find_weights, read_config, read_header, read_run
from peftcli.guard.files import read_json_object
from peftcli.guard.ranges import out_of_range
from peftcli.guard.safetensors_header import TensorEntry
from peftcli.guard.typed_fields import fits, hints_of, mapping_at
from peftcli.methods import config_from_dict
from peftcli.models.hub_files import base_hash
from peftcli.models.quantization import trained_quantization
from peftcli.schema import BaseModel, Quantization
from peftcli.system import hub_requests
from peftcli.system.outputs import expand_user
from peftcli.tasks import DIFFUSERS_FILE, PIPELINE_PARTS, TASK_FILE, TASKS
from peftcli.tasks.found import task_of_class
from peftcli.tasks.settings import CODE
from peftcli.tasks.text.prompts import PromptForm

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from peftcli.core.config import AdapterConfig
    from peftcli.models.open import LoadedModel, OpenBase
    from peftcli.tasks.base import Task

SHARED_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    "README.md",
    "loss.png",
    "added_tokens.json",
    "additional_chat_templates/rag.jinja",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "normalizer.json",
    "preprocessor_config.json",
    "processor_config.json",
    DIFFUSERS_FILE,
    "sentencepiece.bpe.model",
    "source.spm",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "target.spm",
    TASK_FILE,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    *(f"{part}/{name}" for part in PIPELINE_PARTS for name in (CONFIG_FILE, WEIGHTS_FILE)),
)
"""The only files that are pushed or pulled. recipe.yaml and run.json name paths of the machine; the card says what
matters of them."""

_MAX_TASK_FILE = 10_000_000
"""Bytes. The names of 100,000 classes take less."""
_SUBFOLDER = re.compile(r"[\w.-]+(/[\w.-]+)*")
_PICKLE = "adapter_model.bin"
_PICKLED = f"{_PICKLE} is a pickle and is not read: load it once in PEFT, save it again with safe_serialization=True"


@dataclass(frozen=True)
class AdapterSource:
    """An adapter that was found. Each of its files is read once, when it is first needed.

    Whatever reads one raises AdapterError where the file is missing or damaged, or names what is not supported.
    """

    folder: Path
    values: dict[str, Any]
    """The content of adapter_config.json."""
    base_name: str | None = None
    """Base model to use in place of the one that the adapter names."""

    @cached_property
    def config(self) -> AdapterConfig:
        """The adapter's config."""
        config = config_from_dict(self.values, file=str(self.folder / CONFIG_FILE))
        if isinstance(config, NamesAdapters):
            config.find_folder = adapter_folder
        return config

    @cached_property
    def record(self) -> dict[str, Any]:
        """The content of the run.json of the run that trained the adapter; empty without one."""
        return read_run(self.folder)

    @property
    def day(self) -> str | None:
        """The day that chat templates wrote in training, as 2026-01-31; None where no run.json says it."""
        with suppress(TypeError, ValueError):
            return date.fromisoformat(self.record.get("day", "")).isoformat()
        return None

    @cached_property
    def header(self) -> Mapping[str, TensorEntry]:
        """The tensors of the adapter's file, by name."""
        return read_header(find_weights(self.folder))

    @property
    def has_tokenizer(self) -> bool:
        """Whether the adapter has a tokenizer of its own."""
        return os.path.lexists(self.folder / "tokenizer_config.json")

    @cached_property
    def base(self) -> BaseModel:
        """The base model: the adapter's own, quantised as it was trained, or the one given instead.

        Raises:
            AdapterError: the adapter names none.
        """
        if self.base_name:
            return BaseModel(name=self.base_name)
        name = self.config.base_model_name_or_path
        if not name:
            raise AdapterError("names no base model", file=str(self.folder), hint="give one with --base")
        was_folder = mapping_at(self.record, "identity").get("base_model") is not None
        same = mapping_at(self.record, "base_model").get("name") == name
        if was_folder and same and not Path(name).is_absolute() and not os.path.lexists(expand_user(Path(name))):
            message = f"was trained on the folder {name}, which is not in the current folder"
            raise AdapterError(message, file=str(self.folder), hint="give it with --base")
        return BaseModel(name=name, revision=self.config.revision, quantization=self.trained_quantization)

    @property
    def trained_quantization(self) -> Quantization | None:
        """How the base model was quantised when the adapter was trained; None: not at all, or that is not known."""
        return trained_quantization(self.record, self.folder)

    @cached_property
    def task_values(self) -> dict[str, Any]:
        """The content of task.json, as ``write_task`` describes it; empty without the file."""
        path = self.folder / TASK_FILE
        found = read_json_object(path, _MAX_TASK_FILE) if path.is_file() else {}
        if not isinstance(found.get("type", ""), str):
            raise AdapterError("must be the name of a task", key="type", file=str(path))
        return found

    @cached_property
    def task(self) -> str | None:
        """The task in ``TASKS``: the one that task.json or run.json records, else the first one of the task_type.

        Of an adapter without either, it is that of the class that PEFT noted.
        """
        recorded = self.task_values or mapping_at(self.record, "recipe").get("task")
        recorded = recorded.get("type") if isinstance(recorded, dict) else recorded
        if isinstance(recorded, str) and recorded in TASKS:
            return recorded
        kind = self.values.get("task_type")
        if kind is None:
            return task_of_class(self._noted_class) if self._noted_class else None
        return next((name for name, row in TASKS.items() if row.task_type == kind), None)

    @property
    def _noted_class(self) -> str:
        """The class of the base model that PEFT notes where there is no task_type; empty where it is not noted."""
        noted = self.values.get("auto_mapping")
        return str(noted.get("base_model_class")) if isinstance(noted, dict) else ""

    @cached_property
    def recorded_form(self) -> PromptForm | None:
        """The form of prompts that task.json holds; None without it."""
        given = self.task_values.get("prompt")
        return None if given is None else PromptForm.from_json(given, str(self.folder / TASK_FILE))

    @property
    def trained_format(self) -> str | None:
        """The format of the training rows, where task.json or run.json says it."""
        if self.recorded_form is not None:
            return self.recorded_form.format
        found = mapping_at(self.record, "data").get("format")
        return found if isinstance(found, str) else None

    def prompt_form(self, *, has_template: bool, decoder_only: bool = True) -> PromptForm:
        """Return the form in which the model is asked: as it was trained, as far as there is a chat template.

        That of an adapter without task.json is found from run.json.
        """
        recorded = self.recorded_form
        if recorded is not None and (has_template or not recorded.chat):
            return recorded
        shared, format = {"system": recorded.system if recorded else ""}, self.trained_format or "messages"
        return PromptForm.of_rows(format, shared, has_template=has_template, decoder_only=decoder_only)

    @property
    def trained_columns(self) -> dict[str, str]:
        """The names that the training rows gave the task's columns, where run.json says it."""
        found = mapping_at(self.record, "recipe", "dataset", "columns") or mapping_at(self.record, "data", "columns")
        return {name: column for name, column in found.items() if isinstance(column, str)}

    @property
    def answer_limits(self) -> dict[str, int]:
        """The limits of answers in the evaluations of training: max_new_tokens and num_beams, where they are known."""
        given = self.task_values.get("generation") or mapping_at(self.record, "task")
        names = ("max_new_tokens", "num_beams")
        return {name: given[name] for name in names if isinstance(given, dict) and isinstance(given.get(name), int)}

    @property
    def saved_sizes(self) -> dict[str, tuple[int, ...]]:
        """The sizes of the base model's parameters that the adapter holds itself; empty without ``modules_to_save``."""
        if not self.config.modules_to_save:
            return {}
        return {name.removeprefix(self.config.file_prefix): entry.shape for name, entry in self.header.items()}

    @cached_property
    def recorded_settings(self) -> Any:
        """The settings of the task that task.json holds; None without them."""
        of_text = "prompt" in self.task_values and "settings" not in self.task_values
        if not self.task_values or of_text or self.task is None:
            return None
        return read_settings(self.task, self.task_values.get("settings"), str(self.folder / TASK_FILE), "settings")

    @property
    def recorded_options(self) -> dict[str, Any]:
        """The options of ``from_pretrained`` that task.json says, as ``id2label``; empty without the file."""
        options = self.recorded_settings.model_options() if self.recorded_settings is not None else {}
        more = self.task_values.get("config", {})
        if not isinstance(more, dict):
            raise AdapterError("must be an object", key="config", file=str(self.folder / TASK_FILE))
        return {**options, **more}

    def model_options(self, base: OpenBase) -> dict[str, Any]:
        """Return the options of ``from_pretrained`` that give the base model the adapter's head."""
        return self.recorded_options or base.label_options(self.auto_class(lambda: base.config), self.saved_sizes)

    def open_task(self, base: OpenBase) -> Task[Any] | None:
        """Open the adapter's task over its base model; None where the task is not known.

        Of an adapter without task.json, the head says how many classes there are.
        """
        if self.task is None:
            return None
        row, settings = TASKS[self.task], self.recorded_settings
        if settings is None and hasattr(row.settings, "of_model"):
            settings = row.settings.of_model(base.config, self.model_options(base).get("num_labels"))
        return row.open(row.settings() if settings is None else settings, base, self.config)

    def auto_class(self, base_config: Callable[[], PreTrainedConfig]) -> str:
        """Return the name of the transformers class that loads the base model.

        It is that of the task, else the class that PEFT noted, else the first of the base model's ``architectures``.

        Raises:
            AdapterError: transformers has no such class.
        """
        import transformers

        if self.task is not None:
            row = TASKS[self.task]
            return row.of(base_config()).auto_class if row.variants else row.auto_class
        name = self._noted_class
        if not hasattr(getattr(transformers, name, None), "from_pretrained"):
            name = (base_config().architectures or ["AutoModel"])[0]
        if not hasattr(getattr(transformers, name, None), "from_pretrained"):
            raise AdapterError(f"transformers has no class {name}, which the base model's config names")
        return name


def find_adapter(
    name: str,
    base: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    **options: Any,
) -> AdapterSource:
    """Find an adapter and read its config.

    ``base`` is used in place of the base model that the adapter names. ``subfolder`` is where in the folder or
    repository the adapter is; ``options`` are those of ``huggingface_hub.snapshot_download``: token, cache_dir,
    local_files_only, force_download.

    Raises:
        AdapterError: there is no such adapter, its config cannot be read, or its weights are a pickle.
        HubError: the hub has no such repository, or refuses it.
        NetworkError: the hub cannot be reached, and the cache has no copy.
    """
    folder = adapter_folder(name, revision, subfolder, **options)
    return AdapterSource(folder, read_config(folder), base)


def read_settings(task: str, given: Any, file: str, under: str) -> Any:
    """Return the settings of a task that a file of an adapter holds under the key ``under``.

    Raises:
        AdapterError: they are not those of the task, are out of range, or name code to run.
    """
    kind = TASKS[task].settings
    known = hints_of(kind)
    if not isinstance(given, dict) or not all(name in known and fits(given[name], known[name]) for name in given):
        raise AdapterError(f"does not contain the settings of {task}", file=file)
    for name in CODE:
        if given.get(name):
            raise AdapterError("names code to run, which an adapter may not", key=f"{under}.{name}", file=file)
    # the names of an adapter that does not say it may be in an order of first sight
    found = kind(**({"labels_by_number": False} if "labels_by_number" in known else {}) | given)
    for name, problem in out_of_range(found):
        raise AdapterError(problem, key=f"{under}.{name}", file=file)
    return found


def other_base(source: AdapterSource, spec: BaseModel) -> str | None:
    """Return what to say of a base model that is not that of the adapter's run; None: it is, or that is not known.

    Other weights than the run's, quantised or not, count only where the adapter corrects the error of those.
    """
    recorded = mapping_at(source.record, "base_model")
    if source.record.get("makes_up_for_quantization"):
        trained = source.trained_quantization
        if trained and spec.quantization != trained:
            own = f"the {trained.type} weights of {recorded.get('name', spec.name)}"
            return f"{source.folder} corrects the error of {own}, and fits no others"
    if recorded.get("sha256") is None or recorded.get("name") == spec.name:
        return None
    if base_hash(expand_user(Path(spec.name))) in (None, recorded["sha256"]):
        return None
    return f"{source.folder} was trained on {recorded.get('name')}, whose files differ from those of {spec.name}"


def apply_adapter(loaded: LoadedModel, source: AdapterSource) -> None:
    """Put an adapter into a base model, which gets rows for the adapter's tokens.

    Raises:
        AdapterError: the adapter does not fit the base model.
    """
    from peftcli.core.files import load_adapter
    from peftcli.models import conversions, tokens

    model, config = loaded.model, source.config
    load_adapter(
        model,
        config,
        source.folder,
        initialised=loaded.initialised,
        prepare=lambda header: tokens.fit_adapter(model, config, header),
        rename=conversions.renaming_of_older(model),
    )


def adapter_folder(
    adapter: str,
    revision: str | None = None,
    subfolder: str | None = None,
    **options: Any,
) -> Path:
    """Return the folder that holds ``adapter``: itself, or a copy of the hub's in the cache.

    ``user/name@revision`` names a branch, tag or commit, as ``revision`` does for ``user/name``. A copy that is
    already in the cache is used offline. For the arguments and errors see ``find_adapter``.
    """
    folder = expand_user(Path(adapter))
    if adapter and folder.is_dir():
        folder = folder / (subfolder or "")
        if (folder / _PICKLE).is_file() and not (folder / WEIGHTS_FILE).is_file():
            raise AdapterError(f"no {WEIGHTS_FILE} here", file=str(folder), hint=_PICKLED)
        return folder
    name, _, at = adapter.partition("@")
    if at and revision:
        raise AdapterError(f"{adapter!r} names a revision, and another is given")
    if at:
        adapter, revision = name, at
    if not is_hub_id(adapter):
        raise AdapterError(f"{adapter!r} is neither a folder nor a hub id of the form user/name or user/name@revision")
    if subfolder and (not _SUBFOLDER.fullmatch(subfolder) or ".." in subfolder.split("/")):
        raise AdapterError(f"{subfolder!r} is not a folder of a repository", key="subfolder")
    what = f"no folder {adapter} here; on the hub: {adapter}"
    inside = f"{subfolder}/" if subfolder else ""
    files = [inside + name for name in SHARED_FILES]
    snapshot = hub_requests.download_files(adapter, files, revision, what=what, **options)
    folder = snapshot / inside
    if not (folder / WEIGHTS_FILE).is_file():
        hub_requests.refuse_partial_copy(snapshot, what)
        place = f"{subfolder} of {adapter}" if subfolder else adapter
        hint = _PICKLED if inside + _PICKLE in (hub_requests.listed_files(snapshot) or ()) else None
        raise AdapterError(f"no {WEIGHTS_FILE} in {place} on the hub", hint=hint)
    return folder


def is_hub_id(text: str) -> bool:
    """Return whether a text has the form ``user/name``."""
    return "/" in text and hub_requests.is_repo_id(text)
