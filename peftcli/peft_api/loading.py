"""The keywords of PEFT's loading functions: what each does here, and an error for one that is not known."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from peftcli.adapters.load import AdapterSource, find_adapter
from peftcli.core.config import AdapterConfig
from peftcli.core.files import load_adapter, read_tensors
from peftcli.core.inject import inject, set_trainable, unload
from peftcli.core.weights import file_tensors, load_state
from peftcli.errors import AdapterError
from peftcli.guard.adapter_folder import WEIGHTS_FILE
from peftcli.models.conversions import renaming_of_older
from peftcli.peft_api.weights import cast_weights
from peftcli.system.hub_requests import DOWNLOAD_OPTIONS, UNUSED_OPTIONS, download_options

_PLACE = ("revision", "subfolder")
_NO_EFFECT = (
    "device_map",
    "dtype",
    "max_memory",
    "offload_buffers",
    "offload_dir",
    "offload_folder",
    "offload_index",
    "offload_state_dict",
    "quantization_config",
    "torch_dtype",
    "torch_device",
    "trust_remote_code",
    "use_safetensors",
)
"""About a base model that is loaded already, which stays as it is and where it is. Adapter weights go to the device of
the layer that they adapt."""


class LoadResult(NamedTuple):
    """What did not fit when tensors were loaded. What would be a mistake is an error instead."""

    missing_keys: list[str]
    """Names of weights that the tensors lack, and that stay as they were."""
    unexpected_keys: list[str]
    """Names of tensors that belong to no weight."""


def find(model_id: str | Path, options: Mapping[str, Any]) -> AdapterSource:
    """Find the adapter of a folder or hub repository, by the options of PEFT's that say where it is.

    Raises:
        AdapterError: an option is unknown, or the adapter cannot be read.
    """
    known = (*_PLACE, *DOWNLOAD_OPTIONS, *UNUSED_OPTIONS, "repo_type", "use_auth_token", *_NO_EFFECT)
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, (*known, "autocast_adapter_dtype", "key_mapping"), 1)
            raise AdapterError("unknown option" + (f"; did you mean {near[0]}?" if near else ""), key=key)
    if options.get("repo_type") not in (None, "model"):
        raise AdapterError("adapters are read from repositories of type model", key="repo_type")
    given = download_options(options)
    if options.get("use_auth_token") is not None:
        given.setdefault("token", options["use_auth_token"])
    place = {key: options.get(key) for key in _PLACE}
    return find_adapter(str(model_id), **place, **given)


def renaming_for(
    model: nn.Module, config: AdapterConfig, key_mapping: Mapping[str, str] | None
) -> Callable[[str], str] | None:
    """Return ``renaming`` of the mapping that is given, or what translates the names of older forms of the model."""
    if key_mapping is not None or config.file_prefix != "base_model.model.":
        return renaming(key_mapping)
    return renaming(getattr(model, "_checkpoint_conversion_mapping", None)) or renaming_of_older(model)


def renaming(key_mapping: Mapping[str, str] | None) -> Callable[[str], str] | None:
    """Return the function that translates names of an adapter file; None if they stay as they are.

    Of the regular expressions, for names without ``base_model.model.``, the first that matches counts.
    """
    if not key_mapping:
        return None
    patterns = {re.compile(pattern): replacement for pattern, replacement in key_mapping.items()}

    def rename(name: str) -> str:
        prefix = next((prefix for prefix in ("base_model.model.", "base_model.") if name.startswith(prefix)), "")
        path = name.removeprefix(prefix)
        for pattern, replacement in patterns.items():
            new, count = pattern.subn(replacement, path)
            if count:
                return prefix + new
        return name

    return rename


def keep_misfits(model: nn.Module, adapter: str | None, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a file; in place of those of another shape what the adapter holds, with a warning."""
    kept = dict(tensors)
    for key, (layer, tensor, value) in file_tensors(model, adapter).items():
        if key in kept and layer.adapt_from_file(tensor, kept[key]).shape != value.shape:
            shapes = f"{tuple(kept[key].shape)} in the state, {tuple(value.shape)} in the model"
            warnings.warn(f"{key} stays as it is: {shapes}", stacklevel=3)
            kept[key] = value.detach().clone()
    return kept


def load(
    model: nn.Module,
    config: AdapterConfig,
    source: AdapterSource,
    adapter: str,
    *,
    trainable: bool,
    autocast_adapter_dtype: bool,
    rename: Callable[[str], str] | None,
    ignore_mismatched_sizes: bool = False,
) -> None:
    """Put an adapter of a folder into ``model``, under the name ``adapter``; see ``PeftModel.from_pretrained``.

    ``rename`` translates the names of its tensors into those of this model.

    Raises:
        AdapterError: it does not fit. The model is as it was then.
    """
    if ignore_mismatched_sizes:
        config.inference_mode = True  # as load_adapter does: the layers hold what the file holds
        inject(model, config, adapter)
        try:
            tensors = keep_misfits(model, adapter, read_tensors(source.folder, rename))
            load_state(model, tensors, str(source.folder / WEIGHTS_FILE), adapter)
        except AdapterError:
            unload(model, adapter)
            raise
        set_trainable(model, trainable, adapter)
        config.inference_mode = not trainable
    else:
        load_adapter(model, config, source.folder, trainable=trainable, adapter=adapter, rename=rename)
    if not autocast_adapter_dtype:
        cast_weights(model, adapter, as_base=True)
