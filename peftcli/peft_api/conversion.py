"""Turn an adapter of any method that adds to the weights of linear layers into LoRA: the nearest update of some r."""

from __future__ import annotations

import torch
from torch import nn

from peftcli.core.config import TARGETING, AdapterConfig, TargetedConfig
from peftcli.core.layer import (
    AdapterLayer,
    TrainedBias,
    TrainedCopy,
    adapter_layers,
    base_module,
    base_name,
    layers_at,
    path_in_file,
)
from peftcli.core.linear import dense_weight, linear_view
from peftcli.core.merge import ready_to_merge
from peftcli.core.quantised import is_quantised
from peftcli.core.targets import as_pattern
from peftcli.errors import AdapterError, AdapterTypeError
from peftcli.methods.lora import LoraConfig
from peftcli.methods.updates import svd


def as_lora(
    model: nn.Module, adapter: str, config: AdapterConfig | None, r: float
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Return the config and the tensors of a LoRA adapter that does what an adapter of ``model`` does, or nearly so.

    ``config`` says which modules are adapted; without it they are named one by one. ``r`` is that of all layers; or, as
    a float, the share of each update's squared singular values to keep, in as many directions as that takes. Raises
    AdapterTypeError where the model has no such adapter, or a layer's change is no update of a weight.
    """
    if isinstance(r, float) and not 0 < r <= 1:
        raise AdapterError(f"a share must be above 0 and at most 1, not {r}", key="rank")
    if r < 1 and not isinstance(r, float):
        raise AdapterError(f"must be at least 1, not {r}", key="rank")
    found: dict[str, int] = {}
    tensors: dict[str, torch.Tensor] = {}
    for path, layer in adapter_layers(model, adapter).items():
        place = path_in_file(model, path)
        if isinstance(layer, TrainedCopy):
            own = {**layer.own_tensors(), **layer.fixed_tensors()}
            tensors |= {layer.file_name(place, name): value.detach().clone() for name, value in own.items()}
            continue
        a, b = _factors(layer, base_name(model, path), r)
        found[base_name(model, path)] = len(a)
        prefix = f"{LoraConfig.file_prefix}{place}.lora_"
        tensors |= {f"{prefix}A.weight": a, f"{prefix}B.weight": b}
    if not found:
        raise AdapterTypeError(f"Could not detect any layer that supports LoRA conversion in the adapter {adapter!r}")
    return _config(config, found, r), tensors


def can_be_lora(model: nn.Module, adapter: str) -> bool:
    """Return whether ``as_lora`` can turn the adapter into LoRA."""
    layers = {
        base_name(model, path): layer
        for path, layer in adapter_layers(model, adapter).items()
        if not isinstance(layer, TrainedCopy)
    }
    try:
        for name, layer in layers.items():
            _update(layer, name)
    except AdapterError:
        return False
    return bool(layers)


def _factors(layer: AdapterLayer, name: str, r: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (r, in) and B (out, r) of what the layer adds to its module's weight."""
    u, values, v = svd(_update(layer, name))
    if isinstance(r, float):
        energy = values.square().cumsum(0)
        count = min(int(torch.searchsorted(energy, r * energy[-1])) + 1, len(values))
    else:
        count = int(r)
    if count > len(values):
        raise AdapterError(f"{count} is more than {len(values)}, the smaller side of {name}", key="rank")
    dtype = next(iter(layer.own_tensors().values())).dtype
    return v[:count].to(dtype).contiguous(), (u[:, :count] * values[:count]).to(dtype).contiguous()


def _update(layer: AdapterLayer, name: str) -> torch.Tensor:
    """Return what the layer adds to its module's weight: (out, in)."""
    view = linear_view(layer)
    if isinstance(layer, TrainedBias):
        raise AdapterError(f"the adapter trains the bias of {name} too, which LoRA's files hold otherwise", key="bias")
    if view is None:
        raise AdapterTypeError(f"{name} is not a linear layer; only linear layers can become LoRA")
    try:
        return view.as_stored(_weight_update(layer))
    except AdapterError as error:
        raise AdapterTypeError(f"{name} cannot become LoRA: {error.message}") from None


def _weight_update(layer: AdapterLayer) -> torch.Tensor:
    """Return what this adapter alone adds to the weight of its module, as the weight is stored, in float32 or wider."""
    base = base_module(layer)
    tensors = {**dict(base.named_parameters()), **dict(base.named_buffers())}
    if is_quantised(base):
        view = linear_view(base)
        assert view is not None
        tensors["weight"] = view.as_stored(dense_weight(base))
    layers = layers_at(layer)
    enabled = [each.enabled for each in layers]
    try:
        for each in layers:
            each.enabled = each is layer
        with ready_to_merge(layer):
            values = layer.folded(dict(tensors))
            changed = [
                name for name, value in values.items() if not torch.equal(value.to(tensors[name]), tensors[name])
            ]
            if "weight" not in values or not {"weight"}.issuperset(changed):
                raise AdapterError(f"{type(layer).__name__} changes more than a weight")
            return values["weight"].detach() - tensors["weight"].detach().to(values["weight"])
    finally:
        for each, before in zip(layers, enabled, strict=True):
            each.enabled = before


def _config(config: AdapterConfig | None, sizes: dict[str, int], r: float) -> LoraConfig:
    made = LoraConfig(r=1 if isinstance(r, float) else r, lora_alpha=1 if isinstance(r, float) else r)
    made.target_modules = sorted(sizes)
    if isinstance(config, TargetedConfig):
        for key in TARGETING:
            if hasattr(config, key):
                setattr(made, key, getattr(config, key))
    if config is not None:
        made.modules_to_save, made.task_type = config.modules_to_save, config.task_type
        made.base_model_name_or_path, made.revision = config.base_model_name_or_path, config.revision
    if isinstance(r, float):
        made.alpha_pattern = as_pattern({name: float(size) for name, size in sizes.items()}, default=0)
        made.rank_pattern = {name: sizes[name] for name in made.alpha_pattern}
    return made
