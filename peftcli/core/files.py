"""The adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.inject import Injection, inject, meta_copy, set_trainable, unchanged_on_error, unload
from peftcli.core.layer import base_modules
from peftcli.core.protocols import converters, describe, layers_of
from peftcli.core.targets import module_matches
from peftcli.core.weights import adapter_state, check_finite, check_state, load_state
from peftcli.errors import AdapterError, OutOfMemory
from peftcli.guard.adapter_folder import CONFIG_FILE as CONFIG_FILE
from peftcli.guard.adapter_folder import DTYPES, find_weights, open_weights
from peftcli.guard.adapter_folder import WEIGHTS_FILE as WEIGHTS_FILE
from peftcli.guard.adapter_folder import read_config as read_config
from peftcli.guard.files import first_of
from peftcli.guard.safetensors_header import BITS, TensorEntry
from peftcli.system.disk import write_file

_NAMES = {getattr(torch, name): theirs for theirs, name in DTYPES.items()} | {
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
"""Dtypes -> safetensors' names."""
_WIDER, _SMALL = 8, 1024
"""Sizes above this multiple of the base model's largest dimension, and above this number, are rejected."""


def save_adapter(model: nn.Module, config: AdapterConfig, folder: Path, adapter: str | None = None) -> None:
    """Write the model's adapter, or of several the one of that name, into ``folder``: see ``write_adapter``.

    Equal adapters give equal bytes.
    """
    write_adapter(adapter_state(model, adapter), config, folder)


def write_adapter(tensors: Mapping[str, torch.Tensor], config: AdapterConfig, folder: Path) -> None:
    """Write an adapter's tensors and config into ``folder``, each file whole or not at all.

    Raises:
        AdapterError: a weight is not finite.
        StorageError: the folder cannot be written.
    """
    check_finite(tensors)
    # sorted, but not inside: of the patterns that match a module the first one counts
    described = dict(sorted({**describe(config, tensors), "inference_mode": True}.items()))
    write_tensor_file(folder / WEIGHTS_FILE, tensors)
    write_file(folder / CONFIG_FILE, (json.dumps(described, indent=2) + "\n").encode())


def read_tensors(folder: Path, rename: Callable[[str], str] | None = None) -> dict[str, torch.Tensor]:
    """Read the tensors of the folder's ``adapter_model.safetensors``, on the CPU. ``rename`` translates their names.

    Raises:
        AdapterError: the file is missing, damaged, or contains NaN or Inf, or two tensors get one name.
    """
    return read_tensor_file(find_weights(folder), rename)


def read_tensor_file(path: Path, rename: Callable[[str], str] | None = None) -> dict[str, torch.Tensor]:
    """Read a safetensors file as ``read_tensors`` does."""
    with open_weights(path) as (header, file):
        return read_open_tensors(_renamed(header, rename), file, path)


def _renamed(header: Mapping[str, TensorEntry], rename: Callable[[str], str] | None) -> Mapping[str, TensorEntry]:
    if rename is None:
        return header
    renamed: dict[str, TensorEntry] = {}
    for name, entry in header.items():
        if (new := rename(name)) in renamed:
            raise AdapterError(f"two tensors get the name {new}", key="key_mapping")
        renamed[new] = entry
    return renamed


def write_tensor_file(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all. Equal tensors give equal bytes. ``metadata`` is for its header.

    Raises:
        StorageError: it cannot be written.
    """
    made = {name: ((_NAMES[value.dtype], tuple(value.shape)), value.detach) for name, value in tensors.items()}
    write_file(path, content_of(made, metadata))


def content_of(
    tensors: Mapping[str, tuple[tuple[str, tuple[int, ...]], Callable[[], torch.Tensor]]],
    metadata: Mapping[str, str] | None = None,
) -> Iterator[Any]:
    """Give the content of a safetensors file, with no more than one tensor in memory for it.

    Args:
        tensors: Name -> dtype, as safetensors names it, and shape; and a function that returns the tensor.
        metadata: For the header.
    """
    # the widest first, so that each is aligned
    order = sorted(tensors, key=lambda name: (-BITS[tensors[name][0][0]], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        (dtype, shape), _ = tensors[name]
        start, end = end, end + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    described = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    described += b" " * (-len(described) % 8)
    yield len(described).to_bytes(8, "little") + described
    for name in order:
        value = tensors[name][1]().detach().cpu().contiguous()
        assert value.nbytes == math.prod(tensors[name][0][1]) * BITS[tensors[name][0][0]] // 8
        yield value.reshape(-1).view(torch.uint8).numpy()
        del value  # before the next one is made


def read_open_tensors(header: Mapping[str, TensorEntry], file: BufferedReader, path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of an open file's header, sorted by name.

    The file is not mapped: a reader of a mapped file is killed when another process truncates it.
    """
    tensors = {}
    for name, entry in header.items():
        try:
            content = bytearray(entry.size)
        except MemoryError:
            raise OutOfMemory(f"this machine's memory does not hold {path}") from None
        file.seek(entry.start)
        if file.readinto(content) != entry.size:
            raise AdapterError("damaged: it was truncated while it was read", file=str(path))
        dtype = _dtype(entry)
        flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        tensors[name] = flat.view(entry.shape)
    check_finite(tensors, str(path))
    return {name: tensors[name] for name in sorted(tensors)}


def _dtype(entry: TensorEntry) -> torch.dtype:
    return getattr(torch, DTYPES[entry.dtype])


def load_adapter(
    model: nn.Module,
    config: AdapterConfig,
    folder: Path,
    *,
    trainable: bool = False,
    adapter: str = "default",
    initialised: Collection[str] = (),
    prepare: Callable[[Mapping[str, TensorEntry]], object] | None = None,
    rename: Callable[[str], str] | None = None,
) -> Injection:
    """Inject the config's layers into ``model`` and fill them from the folder's weights.

    ``config.inference_mode`` is on while the layers are made, so that each holds what the file holds. Over a model on
    the meta device only the adapter's tensors take memory. For ``initialised`` see ``inject``.

    ``prepare`` receives the header of the weights before it is compared, to give the model rows for new tokens.
    ``rename`` translates the names of the file's tensors into those of this model.

    Raises:
        AdapterError: the config or the tensors do not fit the model, or leave a parameter random. The config is as
            it was then.
    """
    with unchanged_on_error(config):
        config.inference_mode = True
        path = find_weights(folder)
        with open_weights(path) as (stored, file):  # no memory is taken before the header shows that the tensors fit
            header = _renamed(stored, rename)
            convert_config(model, config, dict(zip(header, stored, strict=True)))
            if prepare is not None:
                prepare(header)
            check_header(model, config, header, path, adapter, initialised)
            tensors = read_open_tensors(header, file, path)
        injection = inject(model, config, adapter, initialised=initialised)
        try:
            load_state(model, tensors, str(folder / WEIGHTS_FILE), adapter)
        except AdapterError:
            unload(model, adapter)
            raise
    set_trainable(model, trainable, adapter)
    config.inference_mode = not trainable
    return injection


def convert_config(model: nn.Module, config: AdapterConfig, names: Mapping[str, str]) -> None:
    """Make the config of a file name the modules of this model; ``names`` of tensors: in this model -> in the file."""
    for converter in converters():
        converter.convert_config(model, config, names)
    layers_of(config).read_names(model, config, names.keys())


def unmatched_targets(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Return the entries of ``target_modules`` that no module of the model matches."""
    entries, names = vars(config).get("target_modules"), base_modules(model)
    listed = () if isinstance(entries, str) else entries or ()
    return [entry for entry in sorted(listed) if not any(module_matches(name, entry) for name in names)]


def check_header(
    model: nn.Module,
    config: AdapterConfig,
    header: Mapping[str, TensorEntry],
    path: Path,
    adapter: str = "default",
    initialised: Collection[str] = (),
) -> AdapterConfig:
    """Check that the tensors of the file at ``path`` are those of the config over this model. Takes no memory for them.

    Returns:
        The config, completed by what the model says.

    Raises:
        AdapterError: they are not.
    """
    found = {name: torch.empty(entry.shape, dtype=_dtype(entry), device="meta") for name, entry in header.items()}
    empty, completed = meta_copy(model), copy.deepcopy(config)
    try:
        _check_sizes(model, config, sum(entry.numel for entry in header.values()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when the adapter is injected
            inject(empty, completed, adapter, initialised=initialised)
        check_state(empty, found, str(path), adapter)
    except AdapterError as error:
        hint = next(filter(None, (each.explain(model, config, header.keys()) for each in converters())), None)
        if hint is None and error.file is not None:
            if not (unmatched := unmatched_targets(model, config)):
                raise
            hint = f"no module of the model matches {', '.join(first_of(unmatched))} of target_modules"
        place = error.file or str(path.parent / CONFIG_FILE)
        raise AdapterError(error.message, file=place, key=error.key, hint=hint or error.hint) from None
    finally:
        unload(empty)
    return completed


def _check_sizes(model: nn.Module, config: AdapterConfig, stored: int) -> None:
    """Raise AdapterError for a size that neither the model nor the file explains: its tensors would take memory.

    Some methods draw tensors that their files do not hold.
    """
    most = max([_SMALL, stored, *(_WIDER * max(value.shape, default=0) for value in model.parameters())])
    for key in config.sizes:
        size = vars(config).get(key)
        for number in size.values() if isinstance(size, dict) else [size]:
            if isinstance(number, (int, float)) and number > most:
                raise AdapterError(f"{number:,} is far larger than anything in the base model or the file", key=key)
