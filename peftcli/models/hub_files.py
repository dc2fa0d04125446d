"""Files of a base model on the hub, in the cache of this machine.

transformers would fetch them itself, with retries and time limits of its own, and takes a file that the hub refuses, as
the chat template, for one that the model does not have.
"""

from __future__ import annotations

import glob
import hashlib
import re
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path

from peftcli.errors import HubError, ModelError, NetworkError
from peftcli.guard.adapter_folder import CONFIG_FILE
from peftcli.guard.files import short_repr
from peftcli.schema import BaseModel
from peftcli.system import hub_requests
from peftcli.system.disk import sha256

PIPELINE_FILE = "model_index.json"
"""Says which parts a pipeline of diffusers has."""
_SMALL = ("*.json", "*.txt", "*.model", "*.spm", "*.codes", "*.tokenizer", "*.tiktoken", "*.bpe", "*.vocab")
"""What configs, tokenizers and processors are made of, besides templates."""
_LEFT = [CONFIG_FILE, *(f"*/{pattern}" for pattern in _SMALL)]
"""An adapter's config, with which transformers would load more than the base model; and files of other formats of the
same model, and of checkpoints."""
_NEEDED = ("config.json", "generation_config.json", "token*.json", "*_tokens*.json", "*.jinja")
"""Those without which a model answers differently, and which transformers caches too."""
_OTHER_FORMS = [CONFIG_FILE, "*/*.fp16.*", "*/*.non_ema.*"]
"""An adapter's config, and other variants of a pipeline's weights."""

_ahead: dict[Path, Future[str | None]] = {}
"""Hashes that are being computed."""
_folders: dict[tuple[str, ...], Path] = {}
"""Keeps everything that a process reads of a model at one commit."""


def fetch(base: BaseModel, *names: str) -> Path:
    """Fetch the base model's small files, and those of ``names`` that it has; return their folder in the cache.

    Names of files in folders of it are fetched alone.

    Raises:
        ModelError: the name is not a hub id.
        HubError: the hub has no such model, or refuses it.
        NetworkError: the hub cannot be reached, and the cache has no copy.
    """
    code = ["*.py"] if base.trust_remote_code else []
    inside, named = any("/" in name for name in names), list(map(glob.escape, names))
    if inside:
        return _fetch(base, named)
    return _fetch(base, [*_SMALL, "*.jinja", *code, *named], _LEFT, [*_NEEDED, *code, *named])


def fetch_parts(base: BaseModel, parts: Iterable[str], *, weights: bool = False) -> Path:
    """Fetch the small files of a pipeline's parts, each in a folder of its own, and maybe their safetensors.

    Raises:
        HubError: the hub refuses them.
        NetworkError: the hub cannot be reached, and the cache has no copy.
    """
    kinds = (*_SMALL, *["*.safetensors"] * weights)
    return _fetch(base, [f"{part}/{kind}" for part in parts for kind in kinds], _OTHER_FORMS)


def _fetch(base: BaseModel, patterns: Sequence[str], ignored: Sequence[str] = (), needed: Sequence[str] = ()) -> Path:
    if not hub_requests.is_repo_id(base.name):
        raise ModelError(f"{short_repr(base.name)} is neither a folder nor a hub id", key="base_model")
    model = _key(base)
    if (known := _folders.get((*model, *patterns))) is not None:
        return known
    revision = _folders[model].name if model in _folders else base.revision
    what = f"no folder {base.name} here; on the hub: {base.name}"
    try:
        folder = hub_requests.download_files(base.name, patterns, revision, ignored=ignored, needed=needed, what=what)
    except (HubError, NetworkError) as error:
        error.key = "base_model"
        raise
    _folders[model] = _folders[(*model, *patterns)] = folder
    return folder


def snapshot(base: BaseModel) -> Path | None:
    """Return the cached folder, named as its commit, that this process has read the base model from; None: none."""
    return _folders.get(_key(base))


def _key(base: BaseModel) -> tuple[str, ...]:
    from huggingface_hub import constants

    return (constants.HF_HUB_CACHE, hub_requests.endpoint(), base.name, base.revision or "")


def hash_ahead(path: Path) -> None:
    """Start to compute the ``base_hash`` of a base model in a thread; ``base_hash`` then waits for it."""
    future = _ahead[path] = Future[str | None]()

    def compute() -> None:
        try:
            future.set_result(_base_hash(path))
        except Exception as error:
            future.set_exception(error)  # raised where the hash is asked for

    threading.Thread(target=compute, daemon=True).start()


def base_hash(path: Path) -> str | None:
    """Return one hash over the weights and the config of a base model; None if it has no folder or file."""
    future = _ahead.pop(path, None)
    return _base_hash(path) if future is None else future.result()


def _base_hash(path: Path) -> str | None:
    parts = (PIPELINE_FILE, "*/*.safetensors", "*/*config.json") if (path / PIPELINE_FILE).is_file() else ()
    kinds = parts or ("*.safetensors", "config.json")
    files = [file for kind in kinds for file in sorted(path.glob(kind))] if path.is_dir() else [path]
    if not all(file.is_file() for file in files) or not files:
        return None
    described = ""
    for file in files:
        stored = file.resolve().name  # in the hub's cache, a large file is a link to one that is named by its hash
        content = stored if file.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", stored) else sha256(file)
        described += f"{file.relative_to(path) if parts else file.name} {content}\n"
    return hashlib.sha256(described.encode()).hexdigest()
