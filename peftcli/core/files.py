"""The adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftcli.core.config import AdapterConfig, TargetedConfig
from peftcli.core.inject import Injection, inject, meta_copy, set_trainable, unchanged_on_error, unload
from peftcli.core.layer import base_modules
from peftcli.core.protocols import describe, layers_of
from peftcli.core.targets import module_matches, pattern_value, shortest_names
from peftcli.core.weights import adapter_state, check_finite, check_state, holds_its_file, load_state, named_tensors
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
_EXPERT = re.compile(r"(.+\.experts\.\d+)\.")
"""The name of a tensor of one expert of several, and in it the expert's path."""
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
        return _read(_renamed(header, rename), file, path)


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


def _read(header: Mapping[str, TensorEntry], file: BufferedReader, path: Path) -> dict[str, torch.Tensor]:
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
            if header.keys() != stored.keys():
                _target_renamed(model, config, header)
                _patterns_renamed(model, config, dict(zip(header, stored, strict=True)))
            _read_names(model, config, header)
            if prepare is not None:
                prepare(header)
            check_header(model, config, header, path, adapter, initialised)
            tensors = _read(header, file, path)
        injection = inject(model, config, adapter, initialised=initialised)
        try:
            load_state(model, tensors, str(folder / WEIGHTS_FILE), adapter)
        except AdapterError:
            unload(model, adapter)
            raise
    set_trainable(model, trainable, adapter)
    config.inference_mode = not trainable
    return injection


def begin_from_adapter(
    model: nn.Module, config: AdapterConfig, folder: Path, *, initialised: Collection[str] = ()
) -> Injection:
    """Inject the config's layers as for a new adapter, and begin from the folder's weights; see ``inject``.

    The config has the settings of the folder's. Its modules_to_save become those that the model has.

    Raises:
        AdapterError: as ``check_begin``. Nothing is changed in the model then.
    """
    path = find_weights(folder)
    with open_weights(path) as (header, file):  # the tensors are those of the header that was checked
        check_begin(model, config, header, path, initialised)
        tensors = _read(header, file, path)
    injection = inject(model, config, initialised=initialised)
    try:
        if not holds_its_file(model):
            raise _computed(config, path)
        load_state(model, tensors, str(path))
    except AdapterError:
        unload(model)
        raise
    return injection


def check_begin(
    model: nn.Module,
    config: AdapterConfig,
    header: Mapping[str, TensorEntry],
    path: Path,
    initialised: Collection[str],
) -> None:
    """Check that training can begin from the file at ``path``, over this model, without memory for its tensors.

    The config's modules_to_save become those that the model has: PEFT also writes names that other models use.

    Raises:
        AdapterError: the tensors do not fit the config and the model, or are not what the method trains.
    """
    _read_names(model, config, header)
    as_read = copy.deepcopy(config)
    as_read.inference_mode = True
    config.modules_to_save = check_header(model, as_read, header, path, initialised=initialised).modules_to_save
    if isinstance(config, TargetedConfig) and (unmatched := _unmatched(model, config)):
        config.target_modules = [entry for entry in config.target_modules or () if entry not in unmatched]
    empty = meta_copy(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when the adapter is injected
            inject(empty, copy.deepcopy(config), initialised=initialised)
        if not named_tensors(empty).keys() <= header.keys():
            raise _computed(config, path)
    finally:
        unload(empty)


def _computed(config: AdapterConfig, path: Path) -> AdapterError:
    message = f"holds what {config.peft_type} computes from the weights that it trains; training cannot begin from it"
    return AdapterError(message, file=str(path))


def _unmatched(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Return the entries of ``target_modules`` that no module of the model matches."""
    entries, names = getattr(config, "target_modules", None), base_modules(model)
    listed = () if isinstance(entries, str) else entries or ()
    return [entry for entry in sorted(listed) if not any(module_matches(name, entry) for name in names)]


def _target_renamed(model: nn.Module, config: AdapterConfig, header: Mapping[str, TensorEntry]) -> None:
    """Put the modules that the file's tensors belong to in the place of those ``target_modules`` that the model lacks.

    The names of tensors were translated into those of this model, and those of the setting are older ones.
    """
    if not isinstance(config, TargetedConfig) or not (unmatched := _unmatched(model, config)):
        return
    modules, saved, found = base_modules(model), config.modules_to_save or [], set[str]()
    for tensor in header:
        parts = tensor.removeprefix(config.file_prefix).split(".")
        for end in range(len(parts) - 1, 0, -1):
            if (name := ".".join(parts[:end])) in modules:
                if parts[end] not in modules[name]._parameters and not _is_inside(name, saved):
                    found.add(name)
                break
    kept = [entry for entry in config.target_modules or () if entry not in unmatched]
    config.target_modules = [*kept, *shortest_names(model, sorted(found))]


def _patterns_renamed(model: nn.Module, config: AdapterConfig, names: Mapping[str, str]) -> None:
    """Let ``rank_pattern`` and ``alpha_pattern`` say of this model's modules what they said of those with older names.

    ``names`` are those of the file's tensors: in this model -> in the file.
    """
    modules, older = base_modules(model), dict[str, str]()
    for new, old in names.items():
        path, parts = new.removeprefix(config.file_prefix), old.removeprefix(config.file_prefix).split(".")
        while path and path not in modules:
            path, _, _ = path.rpartition(".")
            parts.pop()
        older[path] = ".".join(parts)
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, key, None) or {}
        values = {new: pattern_value(patterns, old, 0) for new, old in older.items()}
        if any(pattern_value(patterns, new, 0) != value for new, value in values.items()):
            setattr(config, key, {new: values[new] for new in sorted(values, key=len, reverse=True) if values[new]})


def _is_inside(name: str, entries: list[str]) -> bool:
    """Return whether a module is one that ``entries`` match, or in one."""
    parts = name.split(".")
    outer = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(module_matches(each, entry) for each in outer for entry in entries)


def _read_names(model: nn.Module, config: AdapterConfig, header: Mapping[str, TensorEntry]) -> None:
    """Change the config to what the names of the file's tensors say of the modules that PEFT finds by other rules."""
    _add_saved_by_ending(model, config, header)
    layers_of(config).read_names(model, config, header.keys())


def _add_saved_by_ending(model: nn.Module, config: AdapterConfig, header: Mapping[str, TensorEntry]) -> None:
    """Add to ``modules_to_save`` the modules that the file holds and PEFT found by an ending of their names.

    PEFT looks for ``norm`` at the end of a name without regard to dots, and so finds ``post_attention_layernorm``.
    """
    given = config.modules_to_save or []
    if not given:
        return
    own = {path: {**module._parameters, **module._buffers} for path, module in base_modules(model).items()}
    base = {f"{path}.{name}" for path, tensors in own.items() for name, value in tensors.items() if value is not None}
    held = {name.rpartition(".")[0] for each in header if (name := each.removeprefix(config.file_prefix)) in base}
    inside = tuple(f"{path}." for path in base_modules(model) if any(module_matches(path, entry) for entry in given))

    def is_more(name: str) -> bool:
        longer = any(name.endswith(entry) for entry in given) and not f"{name}.".startswith(inside)
        return longer and any(f"{each}.".startswith(f"{name}.") for each in held)

    if more := [name for name in base_modules(model) if is_more(name)]:
        config.modules_to_save = [*given, *more]


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
        place, hint, names = error.file or str(path.parent / CONFIG_FILE), error.hint, base_modules(model)
        experts = (_EXPERT.match(name.removeprefix(config.file_prefix)) for name in header)
        if any(expert and expert[1] not in names for expert in experts):
            hint = (
                "the file has a LoRA for each expert, as transformers 4 had them, and this model has the weights of "
                "all experts in one parameter; load it with PEFT 0.21.2, which converts it, and save it again"
            )
        elif error.file is not None:
            if not (unmatched := _unmatched(model, config)):
                raise
            hint = f"no module of the model matches {', '.join(first_of(unmatched))} of target_modules"
        raise AdapterError(error.message, file=place, key=error.key, hint=hint) from None
    finally:
        unload(empty)
    return completed


def _check_sizes(model: nn.Module, config: AdapterConfig, stored: int) -> None:
    """Raise AdapterError for a size that neither the model nor the file explains: its tensors would take memory.

    Some methods draw tensors that their files do not hold.
    """
    most = max([_SMALL, stored, *(_WIDER * max(value.shape, default=0) for value in model.parameters())])
    for key in config.sizes:
        size = getattr(config, key, None)
        for number in size.values() if isinstance(size, dict) else [size]:
            if isinstance(number, (int, float)) and number > most:
                raise AdapterError(f"{number:,} is far larger than anything in the base model or the file", key=key)
