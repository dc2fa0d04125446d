"""PEFT's way to route among LoRA adapters: see ``peftcli.methods.lora.arrow``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.layer import adapter_layers, base_module, base_name
from peftcli.core.linear import linear_view
from peftcli.errors import AdapterError, AdapterTypeError
from peftcli.methods.lora.config import LoraConfig
from peftcli.methods.lora.lora import LoraLinear
from peftcli.methods.lora.variant_settings import ArrowConfig, variant_of
from peftcli.peft_api.model import PeftModel
from peftcli.system.outputs import expand_user

ROUTER = "arrow_router"
_NOT_ROUTED = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")
"""Settings of a LoRA whose effect the router would leave out."""


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
    if wrong := variant_of(config) or next(iter(on), None):
        raise AdapterError(f"Arrow would leave it out; {name} needs a plain LoRA", key=wrong)
