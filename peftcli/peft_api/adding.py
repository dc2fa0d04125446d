"""Adapters put into a model: a new one, one of a folder or repository, and one in the place of another."""

from __future__ import annotations

import dataclasses
import difflib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from peftcli.adapters.convert import convert_config
from peftcli.adapters.load import AdapterSource, adapter_folder, find_adapter
from peftcli.core.config import AdapterConfig, TargetedConfig
from peftcli.core.files import load_adapter, read_tensors
from peftcli.core.inject import inject, set_active, set_trainable, unload
from peftcli.core.layer import TrainedBias, TrainedCopy, adapter_layers, base_name
from peftcli.core.protocols import NamesAdapters, needs_base_weights, needs_batches
from peftcli.core.quantised import is_quantised
from peftcli.core.weights import (
    adapter_state,
    file_tensors,
    holds_its_file,
    load_state,
    load_training_state,
    named_tensors,
    training_state,
)
from peftcli.errors import AdapterError, AdapterTypeError, PeftWarning
from peftcli.guard.adapter_folder import WEIGHTS_FILE
from peftcli.methods._token_rows import tied_group
from peftcli.models.conversions import renaming_of_older
from peftcli.models.open import open_base
from peftcli.peft_api.layers import cast_weights, empty_state
from peftcli.peft_api.tuner import Tuner, check_name
from peftcli.schema import BaseModel
from peftcli.system.hub_requests import DOWNLOAD_OPTIONS, UNUSED_OPTIONS, download_options

_PLACE = ("revision", "subfolder")
_NO_EFFECT = (
    *("device_map", "dtype", "max_memory", "quantization_config", "torch_device", "torch_dtype", "trust_remote_code"),
    *("offload_buffers", "offload_dir", "offload_folder", "offload_index", "offload_state_dict", "use_safetensors"),
)
"""About a base model that is loaded already, which stays as it is and where it is. Adapter weights go to the device of
the layer that they adapt."""
_NAMED = ("target_modules", "modules_to_save", "layers_pattern", "ensure_weight_tying")
"""Settings that name modules, which two configs of the same modules may do otherwise."""


def check_config(config: Any) -> None:
    """Raise AdapterTypeError for what is no config of peftcli, such as one of PEFT's own."""
    if not isinstance(config, AdapterConfig):
        kind = f"{type(config).__module__}.{type(config).__name__}"
        hint = "make it with the class of that name in peftcli.peft_api" if kind.startswith("peft.") else None
        raise AdapterTypeError(f"expected a config of peftcli, found {kind}", key="peft_config", hint=hint)


def start_adapter(
    model: nn.Module,
    config: Any,
    name: str,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
) -> None:
    """Put a new adapter into ``model``; see ``get_peft_model`` for the arguments.

    A setting or a start that a recipe's training would find is an AdapterError.
    """
    for key in config.found_by_training:
        if getattr(config, key) is None and not config.inference_mode:
            raise AdapterError("is needed: the number of optimizer steps of the whole training", key=key)
    if needs_base_weights(config) and not config.inference_mode and any(map(is_quantised, model.modules())):
        raise AdapterError(
            "loftq starts from the weights before quantisation, and the model holds the quantised ones only",
            key="init_lora_weights",
            hint="leave it out here, and call replace_lora_weights_loftq with the model that you get",
        )
    named, base = config.base_model_name_or_path, getattr(model, "name_or_path", None)
    if base and named != base:
        if named is not None:
            warnings.warn(
                f"base_model_name_or_path was renamed from {named!r} to {base!r}, as the model is called",
                PeftWarning,
                stacklevel=2,
            )
        config.base_model_name_or_path = base
    if isinstance(config, NamesAdapters):
        config.find_folder = adapter_folder

    def load_tokenizer(name: str | None, **options: Any) -> Any:
        if not (name or base):
            raise AdapterError("the model does not say which tokenizer is its own", key="tokenizer_name_or_path")
        return open_base(BaseModel(name=str(name or base))).processor(**options)

    config.prepare(load_tokenizer)
    if config.inference_mode:  # read from a file, maybe of another writer
        convert_config(model, config, {})
    inject(model, config, name)
    if isinstance(config, TargetedConfig) and not config.inference_mode:
        _warn_of_untied(model, config, name)
    if not autocast_adapter_dtype:
        cast_weights(model, name, as_base=True)
    if low_cpu_mem_usage and holds_its_file(model, name) and not needs_batches(config):
        empty_state(model, name)


def add_new(
    model: nn.Module,
    config: Any,
    name: str,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
) -> None:
    """Put a new adapter into ``model``, in the place of one of its name that no ``PeftModel`` has; train it alone.

    ``inference_mode`` freezes it, of soft prompts only modules_to_save. See ``start_adapter`` for the rest.
    """
    with replacing(model, name):
        start_adapter(model, config, name, autocast_adapter_dtype, low_cpu_mem_usage)
    set_trainable(model, not config.inference_mode, name)
    if config.inference_mode and config.trains_in_inference_mode:
        for layer in adapter_layers(model, name).values():
            if not isinstance(layer, TrainedCopy):
                for parameter in layer.own_tensors().values():
                    parameter.requires_grad_(True)


def _warn_of_untied(model: nn.Module, config: AdapterConfig, adapter: str) -> None:
    """Warn if modules share a weight in the base model, and the adapter changes one of them or each in its own way."""
    trained: dict[str, set[nn.Parameter]] = {name: set() for name in tied_group(model)}
    for path, layer in adapter_layers(model, adapter).items():
        if (name := base_name(model, path)) in trained and not isinstance(layer, TrainedBias):
            trained[name].update(layer.own_tensors().values())
    changed = [name for name in trained if trained[name]]
    if not changed or set.intersection(*trained.values()):
        return
    settings = {entry.name for entry in dataclasses.fields(config) if not entry.metadata.get("unsupported")}
    reason = f"no implementation exists to tie the adapters of {config.peft_type}"
    if "ensure_weight_tying" in settings:
        reason = "`ensure_weight_tying` is not set to True"
    text = f"{' and '.join(trained)} share a weight, and the adapter of {' and '.join(changed)} changes it there only"
    if len(changed) == len(trained):
        text = f"{' and '.join(trained)} share a weight, and each gets an adapter of its own"
    warnings.warn(f"{text}: {reason}", PeftWarning, stacklevel=4)


class LoadResult(NamedTuple):
    """Names of weights that the tensors lack, and of tensors that belong to no weight. A mistake is an error."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def find_by_options(model_id: str | Path, options: Mapping[str, Any]) -> AdapterSource:
    """Find the adapter of a folder or hub repository, by the options of PEFT's that say where it is."""
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


def keep_misshaped(
    model: nn.Module, adapter: str | None, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the tensors of a file; in place of those of another shape what the adapter holds, with a warning."""
    kept = dict(tensors)
    for key, (layer, tensor, value) in file_tensors(model, adapter).items():
        if key in kept and layer.adapt_from_file(tensor, kept[key]).shape != value.shape:
            shapes = f"{tuple(kept[key].shape)} in the state, {tuple(value.shape)} in the model"
            warnings.warn(f"{key} stays as it is: {shapes}", stacklevel=3)
            kept[key] = value.detach().clone()
    return kept


def name_adapters(config: AdapterConfig, adapters: Mapping[str, str]) -> None:
    """Let the config of an adapter that mixes others name these: a name each, and its folder or repository."""
    if not isinstance(config, NamesAdapters):
        raise AdapterError(f"works for XLORA, not {config.peft_type}", key="adapters")
    config.adapters = dict(adapters)


@dataclasses.dataclass(frozen=True)
class Loading:
    """How an adapter is loaded: see ``PeftModel.from_pretrained``."""

    trainable: bool
    autocast_adapter_dtype: bool = True
    key_mapping: Mapping[str, str] | None = None
    ignore_mismatched_sizes: bool = False


def load_into(
    model: nn.Module, config: AdapterConfig, source: AdapterSource, adapter: str, how: Loading, **options: Any
) -> None:
    """Put an adapter of a folder into ``model``, under the name ``adapter``, or leave the model as it was.

    ``options`` are more of ``load_adapter``.
    """
    rename = _renaming_for(model, config, how.key_mapping)
    if how.ignore_mismatched_sizes:
        config.inference_mode = True  # as load_adapter does: the layers hold what the file holds
        inject(model, config, adapter)
        try:
            tensors = keep_misshaped(model, adapter, read_tensors(source.folder, rename))
            load_state(model, tensors, str(source.folder / WEIGHTS_FILE), adapter)
        except AdapterError:
            unload(model, adapter)
            raise
        set_trainable(model, how.trainable, adapter)
        config.inference_mode = not how.trainable
    else:
        load_adapter(model, config, source.folder, trainable=how.trainable, adapter=adapter, rename=rename, **options)
    if not how.autocast_adapter_dtype:
        cast_weights(model, adapter, as_base=True)


def replace_adapter(model: nn.Module, name: str, old: AdapterConfig, source: AdapterSource, how: Loading) -> bool:
    """Replace the weights of the adapter called ``name``, or its layers where the configs ``old`` and new differ.

    Returns whether the layers are new ones. If the new adapter does not fit, the model stays as it was.
    """
    config, folder = source.config, source.folder
    rename = _renaming_for(model, config, how.key_mapping)
    new_content, old_content = _content(config), _content(old)
    names = {rename(each) if rename else each for each in source.header}
    if names == adapter_state(model, name).keys():  # so its modules are the same, whatever names them
        new_content, old_content = ({**each, **dict.fromkeys(_NAMED)} for each in (new_content, old_content))
    if new_content == old_content and holds_its_file(model, name):
        # an optimizer may hold the weights: they stay the same objects
        load_state(model, read_tensors(folder, rename), str(folder / WEIGHTS_FILE), name)
        set_trainable(model, how.trainable, name)
        return False
    kept, mode = training_state(model, name), old.inference_mode
    trained = any(value.requires_grad for _, _, value in named_tensors(model, name).values())
    old.inference_mode = holds_its_file(model, name)  # what its layers were made for, should they be made again
    unload(model, name)
    try:
        load_adapter(model, config, folder, trainable=how.trainable, adapter=name, rename=rename)
    except AdapterError:
        inject(model, old, name)
        load_training_state(model, kept, name)
        set_trainable(model, trained, name)
        raise
    finally:
        old.inference_mode = mode
    return True


@contextmanager
def replacing(model: nn.Module, name: str) -> Iterator[None]:
    """Once a new adapter is in the model: remove an old one of its name, and switch others off. Nothing if that fails.

    An adapter of a ``PeftModel`` stays: only the ``PeftModel`` itself can replace it.
    """
    check_name(name)
    others = {layer.adapter for layer in adapter_layers(model).values()} - {name}
    is_held = any(isinstance(module, Tuner) for module in model.modules())
    old = [] if is_held else list(adapter_layers(model, name).values())
    if old:
        text = f"{name!r} is replaced; a new name keeps both"
        text = f"You are trying to modify a model that has an adapter already. {text}"
        warnings.warn(text, PeftWarning, stacklevel=3)
    for layer in old:
        layer.adapter = f"{name} (replaced)"  # no name of an adapter has brackets
    try:
        yield
    except BaseException:
        for layer in old:
            layer.adapter = name
        raise
    if old:
        unload(model, f"{name} (replaced)")
    if others:
        set_active(model, [name])
        for other in others:
            set_trainable(model, False, other)


def _content(config: AdapterConfig) -> dict[str, Any]:
    """The config without what says where the adapter belongs."""
    place = ("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode")
    return {key: value for key, value in config.file_dict().items() if key not in place}


def _renaming_for(
    model: nn.Module, config: AdapterConfig, key_mapping: Mapping[str, str] | None
) -> Callable[[str], str] | None:
    """Return ``renaming`` of the mapping that is given, or what translates the names of older forms of the model."""
    if key_mapping is not None or config.file_prefix != "base_model.model.":
        return renaming(key_mapping)
    return renaming(getattr(model, "_checkpoint_conversion_mapping", None)) or renaming_of_older(model)
