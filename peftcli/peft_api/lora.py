"""PEFT's functions for LoRA adapters: make one of another adapter, route among several, swap one for another."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.files import read_tensors, write_adapter
from peftcli.core.layer import adapter_layers, base_module, base_name
from peftcli.core.linear import linear_view
from peftcli.core.weights import load_state
from peftcli.errors import AdapterError, AdapterTypeError, PeftWarning
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.lora import LoraConv, LoraEmbedding, LoraLayer, LoraLinear
from peftcli.methods.lora.variants import ArrowConfig
from peftcli.peft_api.adding import find_by_options
from peftcli.peft_api.conversion import as_lora
from peftcli.peft_api.hotswap import check_same, swap, widen
from peftcli.peft_api.intruders import Intruders, without_intruders
from peftcli.peft_api.model import PeftModel
from peftcli.peft_api.tuner import find_tuner
from peftcli.system.outputs import expand_user

Conv1d = Conv2d = Conv3d = LoraConv
Embedding = LoraEmbedding
Linear = LoraLinear

ROUTER = "arrow_router"
_NOT_ROUTED = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")
"""Settings of a LoRA whose effect the router would leave out."""


def convert_to_lora(
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Return a LoRA adapter that does what another adapter does, as nearly as its r allows: config and tensors.

    ``rank`` is the r of all layers; or, as a float, the share of each update to keep (see ``peft_api.conversion``).
    No progress bar is shown, and nothing is compiled.

    Raises:
        AdapterTypeError: there is no such adapter, or it does more than add to weights of linear layers.
        AdapterError: the rank does not fit.
    """
    tuner, place = find_tuner(model)
    if tuner is not None:
        tuner.check_unmerged()
    config = tuner.peft_config.get(adapter_name) if tuner else None
    made, tensors = as_lora(place, adapter_name, config, rank)
    if isinstance(config, LoraConfig):
        warnings.warn(f"{adapter_name} is LoRA already", PeftWarning, stacklevel=2)
    if tuner is None:
        tensors = {name.removeprefix(LoraConfig.file_prefix): value for name, value in tensors.items()}
    return made, tensors


def save_as_lora(
    path: str | Path,
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """Write what ``convert_to_lora`` returns into a folder.

    Raises:
        AdapterError: as in ``convert_to_lora``.
        StorageError: the folder cannot be written.
    """
    config, tensors = convert_to_lora(model, rank, adapter_name)
    prefix = LoraConfig.file_prefix
    named = {prefix + name.removeprefix(prefix): value for name, value in tensors.items()}
    write_adapter(named, config, expand_user(Path(path)))


def reduce_intruder_dimension(
    peft_model: PeftModel,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Make an adapter that forgets less of what the base model knew, for some of what was learnt, the active one.

    Args:
        peft_model: a model with a LoRA adapter.
        old_adapter_name: the adapter, which stays.
        new_adapter_name: name of the new one.
        top_k: how many directions of each weight are looked at.
        threshold_epsilon: the likeness to the base weight's directions below which one is an intruder.
        mitigation_lambda: the factor of the intruders' strength that stays. 1: nothing is taken back.
        logging_sink: is given a line for each layer. None: nothing is said.

    Raises:
        AdapterError: the adapter is not a plain LoRA, or the name is taken. Nothing is changed then.
    """
    tuner, model = peft_model.base_model, peft_model.get_base_model()
    tuner.check_known([old_adapter_name])
    tuner.check_new(new_adapter_name)
    old = peft_model.peft_config[old_adapter_name]
    if not isinstance(old, LoraConfig):
        raise AdapterError(f"works for LORA, not {old.peft_type}", key="peft_type")
    if (variant := old.variant_key) in ("kasa_config", "use_bdlora", "use_qalora"):
        raise AdapterError("works for plain LoRA only", key=variant)
    how = Intruders(top_k, threshold_epsilon, mitigation_lambda)
    tensors = without_intruders(model, old_adapter_name, how, logging_sink or (lambda line: None))
    config = copy.deepcopy(old.plain())
    peft_model.add_adapter(new_adapter_name, config)
    load_state(model, tensors, adapter=new_adapter_name)
    peft_model.set_adapter(new_adapter_name)


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str | Path],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str | Path] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """Load LoRA adapters into ``base_model`` and route every token to those that fit it best.

    The adapters are called ``task_0``, ``gks_0`` and so on, and the router ``arrow_router``. Adapters that are loaded
    later take part too.

    Args:
        base_model: the model, without adapters.
        task_specific_adapter_paths: folders or repositories of the experts; a repository's folder is
            ``user/repository/folder``.
        arrow_config: how tokens are routed. The names of the adapters are written into it.
        general_adapter_paths: adapters whose average is taken away from every expert, with ``use_gks``.
        adapter_kwargs: options of ``PeftModel.from_pretrained`` for every adapter.

    Raises:
        AdapterError: an adapter cannot be loaded, is no plain LoRA of linear layers, or has another r than the first.
    """
    general = list(general_adapter_paths or ()) if arrow_config.use_gks else []
    if not task_specific_adapter_paths:
        raise AdapterError("names no adapter", key="task_specific_adapter_paths")
    if arrow_config.use_gks and not general:
        raise AdapterError("are needed for use_gks", key="general_adapter_paths")
    named = {f"task_{number}": str(path) for number, path in enumerate(task_specific_adapter_paths)}
    named |= {f"gks_{number}": str(path) for number, path in enumerate(general)}
    sources = {name: {**_source(path), **adapter_kwargs} for name, path in named.items()}
    model = PeftModel.from_pretrained(base_model, adapter_name="task_0", **sources.pop("task_0"))
    for name, source in sources.items():
        model.load_adapter(adapter_name=name, **source)
    arrow_config.task_adapter_names = [name for name in named if name.startswith("task_")]
    arrow_config.gks_adapter_names = [name for name in named if name.startswith("gks_")]
    targets, r = _common_targets(model, list(named))
    model.add_adapter(ROUTER, LoraConfig(arrow_config=arrow_config, target_modules=targets, r=r))
    model.set_adapter(ROUTER)
    return model


def _source(path: str) -> dict[str, Any]:
    """Return where an adapter is, as options of ``from_pretrained``: ``user/repository/folder`` is in a repository."""
    parts = path.strip("/").split("/")
    if expand_user(Path(path)).is_dir() or len(parts) < 3:
        return {"model_id": path}
    return {"model_id": "/".join(parts[:2]), "subfolder": "/".join(parts[2:])}


def _common_targets(model: PeftModel, names: list[str]) -> tuple[list[str], int]:
    """Return the names of the modules that all these adapters adapt, and their r."""
    base, found = model.get_base_model(), {}
    for name in names:
        _check_plain(name, model.peft_config[name])
        layers = {base_name(base, path): layer for path, layer in adapter_layers(base, name).items()}
        for path, layer in layers.items():
            if linear_view(layer) is None or not isinstance(layer, LoraLinear):
                kind = type(base_module(layer)).__name__
                raise AdapterTypeError(f"LoRA adapters must only target Linear layers; {path} in {name} is a {kind}")
        found[name] = {path: layer.r for path, layer in layers.items()}
    first = found[names[0]]
    for name, sizes in found.items():
        if sizes.keys() != first.keys():
            other = min(sizes.keys() ^ first.keys())
            raise AdapterError(f"target_modules mismatch: {other} is adapted by only one of {names[0]} and {name}")
        if wrong := [path for path in sizes if sizes[path] != first[path]]:
            raise AdapterError(
                f"rank mismatch: {wrong[0]} has r {sizes[wrong[0]]} in {name} and {first[wrong[0]]} in {names[0]}"
            )
    return sorted(first), next(iter(first.values()))


def _check_plain(name: str, config: AdapterConfig) -> None:
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"{name} is {config.peft_type}; Arrow routes among LoRA adapters")
    on = [key for key in _NOT_ROUTED if getattr(config, key)] + ["bias"] * (config.bias != "none")
    if wrong := config.variant_key or next(iter(on), None):
        raise AdapterError(f"Arrow would leave it out; {name} needs a plain LoRA", key=wrong)


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: str | None = None,
    **options: Any,
) -> None:
    """Put the LoRA adapter of a folder or hub repository in the place of one of the model's, under its name.

    The adapter may have another r and lora_alpha, and fewer modules. In a compiled model its r must not be above that
    of the adapter that it replaces: ``prepare_model_for_compiled_hotswap``. The weights go where the old ones are,
    whatever ``torch_device`` is. The new update counts in full, whatever scale was set on the old one's layers.
    ``options`` are those of ``load_adapter``.

    Raises:
        AdapterError: the new adapter cannot be read or does not fit, or the old one is merged. Nothing is changed then.
    """
    tuner, place = find_tuner(model)
    if tuner is None:
        raise AdapterError(f"needs a PeftModel, not a {type(place).__name__}", hint="hotswap_adapter_from_state_dict")
    tuner.check_known([adapter_name])
    source = find_by_options(model_name_or_path, options)
    check_hotswap_configs_compatible(tuner.peft_config[adapter_name], source.config)
    hotswap_adapter_from_state_dict(model, read_tensors(source.folder), adapter_name, _lora(source.config))


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """The same with tensors, also in a plain model. Of the config, what says how strong the update is counts.

    The tensors have the names of the adapter file, or PEFT's: with the adapter's name before ``.weight``, and for plain
    models without ``base_model.model.``. There is no ``parameter_prefix`` but PEFT's.

    Raises:
        AdapterError: the tensors do not fit, or the old adapter is merged. Nothing is changed then.
    """
    tuner, place = find_tuner(model)
    configs = []
    if tuner is not None:
        if adapter_name in tuner.merged_adapters:
            raise AdapterError(f"{adapter_name} is merged; call unmerge_adapter() first", key="adapter_name")
        configs = [_lora(tuner.peft_config[adapter_name])]
    tensors = {_name_in_file(name, adapter_name): value for name, value in state_dict.items()}
    swap(place, adapter_name, config, tensors, *configs, may_widen=not _is_compiled(model))


def check_hotswap_configs_compatible(config0: AdapterConfig, config1: AdapterConfig) -> None:
    """Raise AdapterError if an adapter of one config cannot take the place of an adapter of the other."""
    check_same(_lora(config0), _lora(config1))


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, AdapterConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Give the LoRA adapters of a model the largest r of those that will take their place, before it is compiled.

    What the model computes stays. Without ``target_rank`` there is nothing to do.

    Args:
        model: a model with an adapter.
        target_rank: the r. None: what it is.
        config: configs that are changed to say the same: one, or by the names of the adapters. Those of a model of
            ``get_peft_model`` are changed in any case.
        check_compiled: what a model that is compiled already is: ``error``, ``warn``, or nothing (``ignore``).

    Raises:
        AdapterError: the model is compiled already, has no LoRA layer, or one of a larger r.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise AdapterError(f"must be error, warn or ignore, not {check_compiled!r}", key="check_compiled")
    if _is_compiled(model) and check_compiled != "ignore":
        if check_compiled == "error":
            raise AdapterError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        warnings.warn(
            "prepare_model_for_compiled_hotswap was called with a model that is already compiled, "
            "and will be compiled again",
            stacklevel=2,
        )
    tuner, place = find_tuner(model)
    known = tuner.peft_config if tuner else {}
    layers = [layer for layer in adapter_layers(place).values() if isinstance(layer, LoraLayer)]
    adapters = list(dict.fromkeys(layer.adapter for layer in layers))
    if not adapters:
        raise AdapterError("No adapter layers found on the model; load the first LoRA adapter before")
    if target_rank is None:
        return
    for name in adapters:
        given = config.get(name) if isinstance(config, Mapping) else config
        configs = {id(each): _lora(each) for each in (known.get(name), given) if each is not None}
        widen(place, name, target_rank, *configs.values())


def _is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def _lora(config: AdapterConfig) -> LoraConfig:
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"hot-swapping works for LORA, not {config.peft_type}", key="peft_type")
    return config


def _name_in_file(name: str, adapter: str) -> str:
    plain = name.removeprefix("_orig_mod.").removeprefix(LoraConfig.file_prefix)
    return LoraConfig.file_prefix + re.sub(rf"(lora_\w+)\.{re.escape(adapter)}(?=(\.weight|\.bias)?$)", r"\1", plain)
