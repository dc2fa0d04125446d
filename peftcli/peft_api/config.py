"""PEFT's names of tasks, methods, settings and configs, and the methods that configs have under them. No torch here."""

from __future__ import annotations

import dataclasses
import json
import warnings
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from peftcli.core.config import AdapterConfig, config_class, plain
from peftcli.core.config import TaskType as TaskType
from peftcli.core.prompts.config import SoftPromptConfig
from peftcli.errors import AdapterError, AdapterTypeError, HubError, NetworkError, PeftWarning
from peftcli.guard.adapter_folder import CONFIG_FILE, read_config
from peftcli.guard.files import is_folder, short_repr
from peftcli.guard.typed_fields import choices_of, hints_of
from peftcli.methods import PeftType as PeftType
from peftcli.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig
from peftcli.methods.p_tuning import PromptEncoderConfig
from peftcli.methods.prompt_tuning import PromptTuningConfig
from peftcli.system.disk import write_file
from peftcli.system.hub_requests import (
    DOWNLOAD_OPTIONS,
    UNUSED_OPTIONS,
    download_files,
    download_options,
    endpoint,
    full_repo_id,
    is_repo_id,
    retry,
)
from peftcli.system.outputs import expand_user

PeftConfig = PeftConfigMixin = AdapterConfig
PromptLearningConfig = SoftPromptConfig
PeftError = AdapterError


def _choices(name: str, config: type, key: str) -> Any:
    """Return PEFT's enum of the choices of a setting."""
    return Enum(name, {each: each for each in choices_of(hints_of(config)[key])}, type=str, module=__name__)


PromptTuningInit = _choices("PromptTuningInit", PromptTuningConfig, "prompt_tuning_init")
MultitaskPromptTuningInit = _choices("MultitaskPromptTuningInit", MultitaskPromptTuningConfig, "prompt_tuning_init")
PromptEncoderReparameterizationType = _choices(
    "PromptEncoderReparameterizationType", PromptEncoderConfig, "encoder_reparameterization_type"
)


class ConfigMethods:
    """What every config has under PEFT's names: it is read from a folder or the hub, and written."""

    is_prompt_learning: ClassVar[bool] = False
    """Whether the method trains virtual tokens."""
    is_adaption_prompt: ClassVar[bool] = False
    """Whether the method is LLaMA-Adapter."""
    trains_in_inference_mode: ClassVar[bool] = False
    """Whether PEFT gives a new adapter gradients though its config says ``inference_mode``, as that of a file does."""
    found_by_training: ClassVar[tuple[str, ...]] = ()
    """Fields that ``peftcli train`` sets where they are None, and that code of one's own has to give."""
    penalty_in_loss: ClassVar[bool] = True
    """Whether the model's loss in training holds the method's penalty, as PEFT's does."""
    unknown_to_peft: ClassVar[tuple[str, ...]] = ()
    """Keys that PEFT does not know for the method, and warns of: written where they are set."""

    def to_dict(self: Any) -> dict[str, Any]:
        """Return all settings as they are, under the keys of ``adapter_config.json``."""
        kept = {entry.name for entry in dataclasses.fields(self) if entry.metadata.get("file", True)}
        kept -= {key for key in self.unknown_to_peft if getattr(self, key) is None}
        return {key: value for key, value in dataclasses.asdict(self).items() if key in kept}

    def as_saved(self: Any) -> Any:
        """Return the config that fits the adapter's file: of an adapter in a model, maybe one with other settings."""
        return self

    def save_pretrained(self, save_directory: str | Path, auto_mapping_dict: dict[str, str] | None = None) -> None:
        """Write all settings into the folder's ``adapter_config.json``: sorted, so equal configs give equal bytes.

        Raises:
            StorageError: the folder cannot be written.
        """
        changed = {} if auto_mapping_dict is None else {"auto_mapping": auto_mapping_dict}
        write_file(expand_user(Path(save_directory)) / CONFIG_FILE, _as_file(self.as_saved().to_dict() | changed))

    def push_to_hub(
        self: Any,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool = True,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload what ``save_pretrained`` writes, alone, and return the address of the commit.

        See ``peftcli.adapters.push.push`` for the arguments.

        Raises:
            HubError: the hub refused.
            NetworkError: the hub cannot be reached.
        """
        content, repo_id = _as_file(self.as_saved().to_dict()), full_repo_id(repo_id, token)

        def upload() -> str:
            from huggingface_hub import HfApi

            api = HfApi(endpoint=endpoint(), token=token, library_name="peftcli")
            api.create_repo(repo_id, private=private, exist_ok=True)
            made = api.upload_file(
                path_or_fileobj=content,
                path_in_repo=CONFIG_FILE,
                repo_id=repo_id,
                commit_message=commit_message or "Upload config",
                revision=revision,
                create_pr=create_pr,
            )
            return str(made.pr_url or made.commit_url)

        return retry(upload, repo_id)

    @classmethod
    def from_pretrained(
        cls: Any,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        **options: Any,
    ) -> Any:
        """Return the config in a folder or hub repository, of the method that it names.

        ``options`` are those of ``huggingface_hub.snapshot_download``: token, cache_dir, local_files_only, ... Settings
        of the config count where its file has none, as in PEFT. Warns of other options, and of settings in the file.

        Raises:
            AdapterError: it is not there, cannot be read, or names a method or setting that is not supported.
        """
        folder, inside = expand_user(Path(pretrained_model_name_or_path)), subfolder or "."
        download = download_options(options)
        if not is_folder(folder):
            folder = _from_hub(str(pretrained_model_name_or_path), inside, revision, download)
        path = folder / inside / CONFIG_FILE
        values = cls.from_json_file(path)
        if "peft_type" not in values:
            lacks = f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}."
            raise AdapterTypeError(lacks, file=str(path))
        known = {each.name for each in dataclasses.fields(cls)}
        settings = {key: value for key, value in options.items() if key in known}
        used = {*DOWNLOAD_OPTIONS, *UNUSED_OPTIONS, *(settings.keys() - values.keys())}
        if ignored := sorted(options.keys() - used):
            warnings.warn(f"ignored: {', '.join(ignored)}; {path} says the settings", PeftWarning, stacklevel=2)
        return cls.from_peft_type(**settings | values)

    @classmethod
    def from_json_file(cls, path_json_file: str | Path) -> dict[str, Any]:
        """Return the object in a config's file.

        Raises:
            AdapterError: the file is missing, cannot be read, or is not a JSON object.
        """
        path = Path(path_json_file)
        values = read_config(path.parent, path.name)
        if values.pop("runtime_config", None):
            warnings.warn(f"{path}: runtime_config is ignored; it holds for one run only", stacklevel=2)
        return values

    @classmethod
    def from_peft_type(cls: Any, **values: Any) -> Any:
        """Return the config of the method that ``peft_type`` names, or of this class, with these settings.

        Sets and PEFT's enums are taken, as ``to_dict`` gives them. Warns of keys that the method does not have.

        Raises:
            AdapterError: there is no such method, or a value is wrong.
        """
        kind = cls if cls.peft_type and "peft_type" not in values else config_class(values)
        return kind.from_dict({name: plain(value) for name, value in values.items()}, unknown_keys="warn")


def _as_file(values: dict[str, Any]) -> bytes:
    text = json.dumps(values, indent=2, sort_keys=True, default=sorted)  # sets alone need the default
    return f"{text}\n".encode()


def _from_hub(name: str, inside: str, revision: str | None, options: dict[str, Any]) -> Path:
    """Return the folder of a hub repository's copy in the cache that holds the config."""
    if not is_repo_id(name):
        raise AdapterError(f"{short_repr(name)} is neither a folder nor a hub id of the form user/name")
    try:
        what = f"no folder {name} here; on the hub: {name}"
        return download_files(name, [Path(inside, CONFIG_FILE).as_posix()], revision, what=what, **options)
    except (HubError, NetworkError) as error:  # a ValueError, as PEFT's: so code for it sees that this is no adapter
        raise AdapterError(error.message, hint=error.hint) from error
