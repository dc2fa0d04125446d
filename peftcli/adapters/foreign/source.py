"""What another program left at a path: a file of tensors, and the settings beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from peftcli.adapters.foreign.base import EmptyBase, open_empty
from peftcli.core.config import AdapterConfig
from peftcli.core.files import read_tensor_file
from peftcli.data.rows import count_of
from peftcli.errors import AdapterError
from peftcli.guard.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, read_config, read_header
from peftcli.guard.files import first_of, irregular_kind, is_folder, short_name
from peftcli.guard.safetensors_header import TensorEntry, read_notes
from peftcli.system.secrets import redact

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_KINDS = (".safetensors", ".gguf")
_USUAL = (WEIGHTS_FILE, "adapters.safetensors", "adapter.safetensors", "pytorch_lora_weights.safetensors")
"""Files that are read where a folder holds several, the first that is there."""


@dataclass(frozen=True)
class Source:
    """A file of tensors. Its header is checked before anything of its size is allocated."""

    file: Path
    config: Mapping[str, Any]
    """The content of adapter_config.json beside it; empty without one."""

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file, which has no header of safetensors."""
        return self.file.suffix == ".gguf"

    @cached_property
    def header(self) -> Mapping[str, TensorEntry]:
        """The tensors of a safetensors file, by name."""
        return {} if self.is_gguf else read_header(self.file)

    @cached_property
    def notes(self) -> Mapping[str, str]:
        """The texts in the header of a safetensors file."""
        return read_notes(self.file)

    @cached_property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensors of a safetensors file, on the CPU."""
        return read_tensor_file(self.file)

    def refuse(self, message: str, hint: str | None = None, key: str | None = None) -> AdapterError:
        """Return the error that names this file."""
        return AdapterError(message, file=str(self.file), key=key, hint=hint)


@dataclass(frozen=True)
class Step:
    """What became of a part of the other program's adapter."""

    how: Literal["carried", "translated", "left out"]
    what: str
    note: str


def carried(pairs: int, note: str) -> Step:
    """Return the step that says of so many pairs of A and B how they were carried over."""
    return Step("carried", f"{count_of(pairs, 'pair')} of A and B", note)


@dataclass(frozen=True)
class Request:
    """What a format's ``read`` gets."""

    source: Source
    format: str
    """The row of ``FORMATS``."""
    base: str | None = None
    """The base model that the user names."""
    alpha: float | None = None
    """lora_alpha, for files that do not hold it."""

    def open_base(self, named: object = None, **options: Any) -> EmptyBase:
        """Open the user's base model, else the one that the file has ``named``, without weights.

        Raises:
            AdapterError: there is neither.
            ModelError, HubError, NetworkError: it cannot be opened.
        """
        name = self.base or named
        if not isinstance(name, str) or not name:
            raise self.source.refuse("does not name its base model, which gives the modules' names", "add --base MODEL")
        return open_empty(redact(name), **options)


@dataclass(frozen=True)
class Converted:
    """An adapter of ours, and how it was made."""

    base: EmptyBase
    config: AdapterConfig
    tensors: Mapping[str, torch.Tensor]
    steps: list[Step] = field(default_factory=list)


def find_source(path: Path) -> Source:
    """Find the file of tensors at ``path``, which is that file or its folder.

    Raises:
        AdapterError: there is none, or several, or it is a pickle.
    """
    if not is_folder(path):
        if (wrong := irregular_kind(path)) or not path.exists():
            raise AdapterError(wrong or "no such file or folder", file=short_name(str(path)))
        _refuse_pickle(path)
        if path.suffix not in _KINDS:
            raise AdapterError(f"is no {' or '.join(_KINDS)} file", file=short_name(str(path)))
        return Source(path, _config(path.parent))
    found = sorted(each for each in path.iterdir() if each.suffix in _KINDS)
    usual = [path / name for name in _USUAL if path / name in found]
    if len(found) != 1 and not usual:
        for each in sorted(path.iterdir()):
            _refuse_pickle(each)
        listed = ", ".join(first_of([short_name(each.name) for each in found]))
        raise AdapterError(
            f"holds several files of tensors: {listed}" if found else "holds no file of tensors: .safetensors or .gguf",
            file=str(path),
            hint="name the file" if found else None,
        )
    return Source(usual[0] if usual else found[0], _config(path))


def _config(folder: Path) -> dict[str, Any]:
    return read_config(folder) if (folder / CONFIG_FILE).is_file() else {}


def _refuse_pickle(path: Path) -> None:
    if path.suffix in _PICKLES:
        raise AdapterError(
            "is a pickle, which can run code and is not read",
            file=short_name(str(path)),
            hint="load it once in the program that wrote it, and save its tensors with safetensors.torch.save_file",
        )
