"""The name of a base model becomes a folder on this machine. No torch here."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from peftcli.errors import HubError, ModelError, NetworkError
from peftcli.guard.adapter_folder import CONFIG_FILE
from peftcli.guard.files import irregular_kind, is_folder, short_name
from peftcli.models import hub_files
from peftcli.models.hub_files import PIPELINE_FILE
from peftcli.schema import BaseModel
from peftcli.system import hub_requests
from peftcli.system.outputs import expand_user

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class FoundBase:
    """Where a base model's files are."""

    folder: Path
    on_hub: bool
    """Whether the folder is the cache's copy of one commit on the hub."""

    @property
    def is_pipeline(self) -> bool:
        """Whether the folder holds a pipeline of diffusers: parts, each in a folder of its own."""
        return os.path.lexists(self.folder / PIPELINE_FILE)


def find_base(spec: BaseModel) -> FoundBase:
    """Find a base model's folder; of one on the hub, its small files are fetched.

    Raises:
        ModelError: there is no such model.
        HubError: the hub has no such model, or refuses it.
        NetworkError: the hub cannot be reached.
    """
    path = expand_user(Path(spec.name))
    if spec.name.endswith(".gguf"):
        if (wrong := irregular_kind(path)) or not path.exists():
            raise ModelError(wrong or "no such file", file=short_name(spec.name), key="base_model")
        if importlib.util.find_spec("gguf") is None:
            raise ModelError("reading .gguf needs the package gguf", hint="pip install 'peftcli[gguf]'")
        return FoundBase(path.parent, on_hub=False)
    if is_folder(path):
        _refuse_adapter(path)
        if not _describes_model(path):
            message = f"{short_name(spec.name)} is not a model folder: it has no config.json"
            raise ModelError(message, key="base_model")
        return FoundBase(path, on_hub=False)
    if is_path(spec.name) or os.path.lexists(path):
        raise ModelError(f"no model folder {short_name(spec.name)}", key="base_model", hint=_similar_folder(path))
    if spec.trust_remote_code and not _COMMIT.fullmatch(spec.revision or ""):
        raise ModelError(
            "code from the hub runs at a pinned commit only",
            key="base_model.revision",
            hint="give the 40 digits of the commit whose code you have read",
        )
    try:
        folder = hub_files.fetch(spec)
    except (HubError, NetworkError) as error:
        if "/" in spec.name and (hint := _similar_folder(path)):
            if isinstance(error, HubError):
                raise ModelError(f"no model folder {spec.name}", key="base_model", hint=hint) from None
            error.hint = "\n".join(filter(None, (hint, error.hint)))  # the network may be to blame all the same
        raise
    if not _describes_model(folder):
        hub_requests.refuse_partial_copy(folder, spec.name, "base_model")
        raise ModelError(f"{spec.name} on the hub is not a model: it has no config.json", key="base_model")
    _refuse_adapter(folder)  # one that was fetched as an adapter; the base model's own is not
    return FoundBase(folder, on_hub=True)


def is_path(name: str) -> bool:
    """Return whether a base model's name is a path and not a hub id, even if there is no such file."""
    return name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1


def _similar_folder(path: Path) -> str | None:
    """Suggest a folder beside ``path`` with a similar name; None if there is no such folder."""
    try:
        names = [each.name for each in path.parent.iterdir() if each.is_dir()]
    except OSError:
        return None
    near = difflib.get_close_matches(path.name[:100], names, 1, 0.7)
    return f"did you mean {str(path.with_name(near[0]))!r}?" if near else None


def _describes_model(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in ("config.json", PIPELINE_FILE))


def _refuse_adapter(folder: Path) -> None:
    # transformers would load it, and the base model that it names
    if irregular_kind(folder / CONFIG_FILE) is not None or (folder / CONFIG_FILE).exists():
        raise ModelError(
            "contains an adapter, which transformers would also load",
            file=str(folder),
            key="base_model",
            hint="name the base model of the adapter",
        )
