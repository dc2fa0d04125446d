"""PEFT's state dicts: an adapter's tensors by the names of its file, and the base model's by their own names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from torch.distributed.tensor import DTensor

from peftcli.adapters.load import find_adapter, is_hub_id
from peftcli.core.config import AdapterConfig
from peftcli.core.files import read_tensors
from peftcli.core.inject import shallow_copy
from peftcli.core.layer import AdapterLayer, TrainedCopy, adapter_layers, base_module, without_wrappers
from peftcli.core.protocols import describe
from peftcli.core.weights import adapter_state, base_weights, file_tensors, load_state
from peftcli.errors import AdapterError
from peftcli.methods.combinations import Adapter, Combination
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.combine import combine
from peftcli.methods.lora.updates import pairs
from peftcli.peft_api.adding import LoadResult, find_by_options, keep_misshaped, renaming
from peftcli.peft_api.tuner import Tuner, find_tuner

_EMBEDDINGS = ("embed_tokens.base_layer", "lm_head.base_layer")
"""What PEFT writes where an adapter targets it. Other names of embeddings and heads it does not look for."""
_PREFIX = "base_model.model."


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    adapter_name: str | None = None,
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors by the names of the adapter file.

    Args:
        model: a ``PeftModel``, or a model with an adapter in it, whose names have no ``base_model.model.``.
        state_dict: the model's state, where it is gathered from several devices; None: what the model holds.
        adapter_name: which adapter; None: ``default``, or the active one if none is called so.
        unwrap_compiled: PEFT's; a compiled model is always unwrapped, and names never contain ``_orig_mod``.
        save_embedding_layers: whether the base model's embedding and head belong to it: see ``save_pretrained``.

    Raises:
        AdapterError: there is no such adapter, or without a name there are several, or ``state_dict`` lacks a tensor.
    """
    tuner, place, name = _place(model, adapter_name)
    if state_dict is not None:
        place = copy_with_state(place, state_dict, name)
    tensors = adapter_state(place, name)
    configs = getattr(model, "peft_config", {}) if tuner is None else tuner.peft_config
    name = name or next(iter(configs), "")
    if name in configs:
        tensors |= embedding_layers(place, configs[name], name, save_embedding_layers)
    return tensors if tuner else {key.removeprefix(_PREFIX): value for key, value in tensors.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str | None = None,
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Copy an adapter's tensors, by the names of the adapter file, into a ``PeftModel`` or a model with an adapter.

    In that the names may lack ``base_model.model.``. With ``ignore_mismatched_sizes`` weights of another shape stay as
    they are, with a warning. Weights on the meta device always get memory.

    Returns:
        Names that are missing or unexpected: none, since these are errors.

    Raises:
        AdapterError: there is no such adapter, or the tensors are not those that it has. Nothing is changed then.
    """
    tuner, place, name = _place(model, adapter_name)
    tensors = {without_wrappers(key): value for key, value in peft_model_state_dict.items()}
    own = file_tensors(place, name)
    if tuner is None:
        tensors = {key if key in own else _PREFIX + key: value for key, value in tensors.items()}
    if ignore_mismatched_sizes:
        tensors = keep_misshaped(place, name, tensors)
    load_state(place, tensors, adapter=name)
    return LoadResult([], [])


def load_peft_weights(
    model_id: str | Path, device: str | None = None, key_mapping: Mapping[str, str] | None = None, **options: Any
) -> dict[str, torch.Tensor]:
    """Read the tensors of an adapter in a folder or hub repository, onto the CPU unless a device is given.

    ``key_mapping`` and ``options`` are those of ``PeftModel.from_pretrained``.

    Raises:
        AdapterError: there is no adapter, its weights are damaged or a pickle, or an option is unknown.
    """
    tensors = read_tensors(find_by_options(model_id, options).folder, renaming(key_mapping))
    return {name: value.to(device or "cpu") for name, value in tensors.items()}


def get_base_model_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the base model's state by the names that it has without adapters. Merged adapters are in its weights."""
    _, place, _ = _place(model, None, one=False)
    return {name: value for key, value in place.state_dict().items() if (name := _base_key(place, key)) is not None}


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], strict: bool = True
) -> LoadResult:
    """Load a state of the base model, by the names that it has without adapters, into a model with adapters.

    With ``strict`` its names must be those of the base model.

    Returns:
        Names that are missing in ``state_dict``, and those of it that the base model lacks.

    Raises:
        RuntimeError: as ``load_state_dict`` of PyTorch: names with ``strict``, or shapes, do not fit.
        AdapterError: adapters are merged into the weights.
    """
    tuner, place, _ = _place(model, None, one=False)
    if tuner is not None:
        tuner.check_unmerged()
    keys = {name: key for key in place.state_dict() if (name := _base_key(place, key)) is not None}
    result = LoadResult([name for name in keys if name not in state_dict], [k for k in state_dict if k not in keys])
    if strict and (result.missing_keys or result.unexpected_keys):
        kinds = {"Missing": result.missing_keys, "Unexpected": result.unexpected_keys}
        listed = [f"{kind} key(s) in state_dict: {', '.join(names)}" for kind, names in kinds.items() if names]
        raise RuntimeError("the state does not fit the base model:\n  " + "\n  ".join(listed))
    place.load_state_dict({keys[name]: value for name, value in state_dict.items() if name in keys}, strict=False)
    return result


def refuse_pickle(safe_serialization: bool) -> None:
    """Raise AdapterError where a pickle is asked for."""
    if not safe_serialization:
        raise AdapterError("False would write a pickle, which can run code when it is read", key="safe_serialization")


def copy_with_state(model: nn.Module, state: Mapping[str, torch.Tensor], adapter: str | None = None) -> nn.Module:
    """Return a copy of a model with adapters that holds the tensors of ``state``, and where it lacks them the model's.

    Of a tensor that modules share, the state needs one name. A state without a tensor that the adapter trains (or
    any, where none is named) is an AdapterError.
    """
    tensors = model.state_dict(keep_vars=True)
    own = {without_wrappers(name): value for name, value in tensors.items()}
    given = {without_wrappers(name).removeprefix(_PREFIX): value for name, value in state.items()}
    found: dict[int, torch.Tensor] = {}
    for name, value in given.items():
        if name in own and not value.is_meta:  # one parameter for all places of a shared tensor, as in the model
            mine = own[name]
            found[id(mine)] = nn.Parameter(value, mine.requires_grad) if type(mine) is nn.Parameter else value
    trained = {id(each) for layer in adapter_layers(model, adapter).values() for each in layer.own_tensors().values()}
    if missing := [name for name, value in own.items() if id(value) in trained - found.keys()]:
        raise AdapterError(f"lacks {_PREFIX}{missing[0]}", key="state_dict")
    copied, new = shallow_copy(model), {name: found[id(value)] for name, value in tensors.items() if id(value) in found}
    copied.load_state_dict(new, strict=False, assign=True)
    return copied


def _place(model: Any, name: str | None, one: bool = True) -> tuple[Tuner | None, nn.Module, str | None]:
    """Return the tuner, where there is one, the model that holds the adapter layers, and the adapter's name."""
    tuner, place = find_tuner(model)
    if tuner is not None and tuner is getattr(model, "_orig_mod", model):
        place, tuner = tuner, None  # without a PeftModel around it, names begin inside the tuner
    if tuner is None:
        names = {layer.adapter for layer in adapter_layers(place).values()}
        return None, place, "default" if name is None and len(names) > 1 and "default" in names else name
    if not one:
        return tuner, place, None
    if name is None:
        name = "default" if "default" in tuner.peft_config else tuner.single_active_adapter()
    tuner.check_known([name])
    return tuner, place, name


def _base_key(model: nn.Module, key: str) -> str | None:
    """Return the name that the tensor ``key`` of the model's state has without adapters; None for an adapter's."""
    module: Any = model
    kept = []
    for part in key.split("."):
        if isinstance(module, AdapterLayer):
            if part != "base_layer":
                return None
        else:
            kept.append(part)
        module = module._modules.get(part) if isinstance(module, nn.Module) else None
    return without_wrappers(".".join(kept))


def embedding_layers(model: Any, config: AdapterConfig, adapter: str, save: bool | str) -> dict[str, torch.Tensor]:
    """Return the weights to write beside an adapter's own, by their names in the file.

    With ``save`` they are embedding and head. ``auto``: the same where the model has another number of tokens than the
    checkpoint that the config names, else those that are targets. A weight that this process does not hold as a whole,
    offloaded or divided, is an AdapterError.
    """
    if save not in (True, False, "auto"):
        raise AdapterError(f'is {save!r}; known: "auto", True, False', key="save_embedding_layers")
    if save is False:
        return {}
    found = {parameter: name for name, parameter in reversed(base_weights(model, adapter, config.file_prefix).items())}
    copied = [base_module(each) for each in adapter_layers(model, adapter).values() if isinstance(each, TrainedCopy)]
    for value in (value for each in copied for value in each.parameters()):
        found.pop(value, None)  # the file holds the copy
    if save == "auto" and not _is_resized(model, config):
        rows = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None)
        found = {value: name for value, name in found.items() if not rows and any(part in name for part in _EMBEDDINGS)}
    if missing := [name for value, name in found.items() if value.is_meta or isinstance(value, DTensor)]:
        hint = "give a state that holds it, or pass save_embedding_layers=False"
        raise AdapterError(f"lacks {missing[0]}, which is not whole in this process", key="state_dict", hint=hint)
    return {name: value.detach() for value, name in found.items()}


def _is_resized(model: Any, config: AdapterConfig) -> bool:
    """Return whether the model has another number of tokens than its checkpoint, as far as this machine has that."""
    name = config.base_model_name_or_path
    if not name or not hasattr(getattr(model, "config", None), "get_text_config"):
        return False
    path = Path(name, "config.json")
    if not path.is_file() and is_hub_id(name):
        path = Path(try_to_load_from_cache(name, "config.json", revision=config.revision) or path)
    if not path.is_file():
        return False
    before = type(model.config).from_pretrained(path.parent)
    sizes = [getattr(each.get_text_config(), "vocab_size", None) for each in (before, model.config)]
    return sizes[0] != sizes[1]


def remove_start(
    config: AdapterConfig, tensors: Mapping[str, torch.Tensor], start: str | Path
) -> tuple[AdapterConfig, Mapping[str, torch.Tensor]]:
    """Return a LoRA adapter without what it was at the start: one of twice the r.

    ``start`` is the folder that the adapter was saved in before it was trained. An adapter whose start was never taken
    out of the base model's weights is returned as it is: its file says the same.
    """
    if not isinstance(config, LoraConfig):
        key = "path_initial_model_for_weight_conversion"
        raise AdapterError(f"works for LORA, not {config.peft_type}", key=key)
    if describe(config, tensors)["r"] != config.r:
        return config, tensors
    source = find_adapter(str(start))
    given = [
        Adapter("the adapter", config, _factors(tensors)),
        Adapter(str(start), source.config, _factors(read_tensors(source.folder))),
    ]
    combined = combine(given, [1, -1], Combination("cat"))
    return combined.config, {**tensors, **combined.tensors}


def _factors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {name for pair in pairs(tensors).values() for name in (pair.a, pair.b, pair.bias)}
    return {name: value for name, value in tensors.items() if name in names}
