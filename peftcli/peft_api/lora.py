"""PEFT's functions that make a LoRA adapter: of another one, without intruders, or a router of several."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftcli.core.files import write_adapter
from peftcli.core.layer import adapter_layers, base_module, base_name, widened
from peftcli.core.linear import dense_weight, linear_view
from peftcli.core.weights import adapter_state, load_state
from peftcli.errors import AdapterError, AdapterTypeError, PeftWarning
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.lora import LoraConv, LoraEmbedding, LoraLayer, LoraLinear, lora_layers
from peftcli.methods.lora.updates import pairs
from peftcli.methods.lora.variants import ArrowConfig
from peftcli.peft_api.conversion import as_lora
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
    tensors = adapter_state(model, old_adapter_name)
    names = pairs(tensors)
    for path, layer in lora_layers(model, old_adapter_name).items():
        if layer.lora_magnitude_vector is not None or path not in names:
            raise AdapterError(f"{path}: works for plain LoRA only", key="old_adapter_name")
        weight, update = _matrices(layer, path)
        intruders, count = _intruders(weight, update, top_k, threshold_epsilon)
        if logging_sink is not None:
            logging_sink(f"{path}: {count or 'no'} intruders")
        if count:
            update = update - (1 - mitigation_lambda) * intruders
            a, b = tensors[names[path].a], tensors[names[path].b]
            u, values, v = torch.linalg.svd(update / layer.scaling, full_matrices=False)
            root = values[: len(a)].sqrt()
            tensors[names[path].a] = (root.unsqueeze(1) * v[: len(a)]).view_as(a).to(a.dtype)
            tensors[names[path].b] = (u[:, : len(a)] * root).view_as(b).to(b.dtype)
    peft_model.add_adapter(new_adapter_name, copy.deepcopy(old.plain()))
    load_state(model, tensors, adapter=new_adapter_name)
    peft_model.set_adapter(new_adapter_name)


def _intruders(weight: torch.Tensor, update: torch.Tensor, top_k: int, threshold: float) -> tuple[torch.Tensor, int]:
    """Return the intruders' part of the sum, and their number: strong directions that the base weight does not have.

    What was learnt through them makes the model forget most (https://arxiv.org/abs/2410.21228).
    """
    base = torch.linalg.svd(weight, full_matrices=False).U
    u, values, v = torch.linalg.svd(weight + update, full_matrices=False)
    likeness = (u.T @ base).abs().amax(dim=1)[:top_k]
    found = (likeness < threshold).nonzero().flatten()
    return (u[:, found] * values[found]) @ v[found], len(found)


@torch.no_grad()
def _matrices(layer: LoraLayer, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the base weight and the update of a layer as matrices (out, in)."""
    view, base = linear_view(layer), base_module(layer)
    if view is not None:
        return dense_weight(layer), view.as_stored(layer.delta()).to(dense_weight(layer))
    weight = widened(base.weight)
    if isinstance(layer, LoraEmbedding):
        return weight.T, layer.delta().T.to(weight)
    if getattr(base, "groups", 1) > 1:
        raise AdapterError(f"{path} is a convolution with groups", key="old_adapter_name")
    return weight.flatten(1), layer.delta().flatten(1).to(weight)


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
        arrow_config: how tokens are routed; the adapters' names are written into it.
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
    model: Any = base_model
    for name, path in named.items():
        parts = path.strip("/").split("/")
        place: dict[str, Any] = {"model_id": path, **adapter_kwargs}
        if len(parts) > 2 and not expand_user(Path(path)).is_dir():
            place = {"model_id": "/".join(parts[:2]), "subfolder": "/".join(parts[2:]), **adapter_kwargs}
        if name == "task_0":
            model = PeftModel.from_pretrained(base_model, adapter_name=name, **place)
        else:
            model.load_adapter(adapter_name=name, **place)
    arrow_config.task_adapter_names = [name for name in named if name.startswith("task_")]
    arrow_config.gks_adapter_names = [name for name in named if name.startswith("gks_")]
    targets, r = _common_targets(model, list(named))
    model.add_adapter(ROUTER, LoraConfig(arrow_config=arrow_config, target_modules=targets, r=r))
    model.set_adapter(ROUTER)
    return model


def _common_targets(model: PeftModel, names: list[str]) -> tuple[list[str], int]:
    """Return the names of the modules that all these adapters adapt, and their r."""
    base, found = model.get_base_model(), {}
    for name in names:
        config = model.peft_config[name]
        if not isinstance(config, LoraConfig):
            raise AdapterError(f"{name} is {config.peft_type}; Arrow routes among LoRA adapters")
        on = [key for key in _NOT_ROUTED if getattr(config, key)] + ["bias"] * (config.bias != "none")
        if wrong := config.variant_key or next(iter(on), None):
            raise AdapterError(f"Arrow would leave it out; {name} needs a plain LoRA", key=wrong)
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
        for path in sizes:
            if sizes[path] != first[path]:
                raise AdapterError(
                    f"rank mismatch: {path} has r {sizes[path]} in {name} and {first[path]} in {names[0]}"
                )
    return sorted(first), next(iter(first.values()))
