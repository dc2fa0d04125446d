"""What every adapter layer can do under PEFT's names: be switched, merged, deleted, and say how files are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peftcli.errors import AdapterError

_SAME_SIZE = {
    "in_features": ("in_channels", "num_embeddings", "nx"),
    "out_features": ("out_channels", "embedding_dim", "nf"),
}
"""What layers that are not linear call their sizes."""


class PeftLayerMixin:
    """PEFT's attributes and methods of an ``AdapterLayer``. Libraries call them on each layer of a model."""

    active_adapters: list[str]
    """Names of the model's active adapters. While they are disabled they are active too."""
    merged_adapters: list[str]
    """The name of the layer's adapter while that is merged into the base weights."""
    full_scaling: float | None = None
    """Of a layer whose update is multiplied by ``scaling``: what that is at first."""
    merged_layers: list[Any]
    """Of the innermost layer on a module: those on it that were merged by ``merge``."""
    before_merging: list[tuple[Any, str, Any]]
    """What they replaced: module, name, and the weight or buffer that was there."""

    @property
    def active_adapter(self) -> list[str]:
        """Names of the model's active adapters. PEFT's layers, unlike its models, give a list of a single one too."""
        return list(self.active_adapters)

    @property
    def merged(self) -> bool:
        """Whether the layer's adapter is merged into the base weights."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self: Any) -> bool:
        """Whether the layer's adapter is active and switched off."""
        return self.adapter in self.active_adapters and not self.enabled and not self.merged_adapters

    def set_adapter(self: Any, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Enable the layer if its adapter is one of these, and let its weights train; else the reverse.

        With ``inference_mode`` they are frozen in any case.

        Raises:
            AdapterError: the layer would override that of another of these adapters.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check_active(names)
        self.active_adapters = names
        self.enabled = self.adapter in names and not self.merged_adapters
        for parameter in self.own_tensors().values():
            parameter.requires_grad_(self.enabled and not inference_mode)

    def enable_adapters(self: Any, enabled: bool) -> None:
        """Disable the layer, or enable it again if its adapter is an active one. One that is merged is unmerged."""
        if not enabled:
            self.unmerge()
        self.enabled = enabled and self.adapter in self.active_adapters and not self.merged_adapters

    def set_scale(self: Any, adapter: str, scale: float) -> None:
        """Use this share of the update if ``adapter`` is the layer's."""
        if adapter == self.adapter and self.full_scaling is not None:
            self.scaling = scale * self.full_scaling

    def scale_layer(self: Any, scale: float) -> None:
        """Multiply the share of the update that is used, if the layer is enabled."""
        if self.enabled and self.full_scaling is not None:
            self.scaling *= scale

    def unscale_layer(self: Any, scale: float | None = None) -> None:
        """Divide that share, or use the whole update again; if the layer is enabled."""
        if self.enabled and self.full_scaling is not None:
            self.scaling = self.full_scaling if scale is None else self.scaling / scale

    def get_base_layer(self) -> Any:
        """Return the base model's module."""
        return layers_at(self)[-1].base_layer

    def merge(self: Any, safe_merge: bool = True, adapter_names: Sequence[str] | None = None) -> None:
        """Put the layer's update into the base weights, until ``unmerge``, if its adapter is one of these, or active.

        Merged weights are checked to be finite, whatever ``safe_merge`` is.

        Raises:
            AdapterError: the layer cannot be merged, or a merged weight is not finite. Nothing is changed then.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        if self.adapter in names and not self.merged_adapters:
            innermost = layers_at(self)[-1]
            innermost._merge_only([*innermost.merged_layers, self])

    def unmerge(self: Any) -> None:
        """Take back ``merge``, exactly; what else is merged on the module stays so.

        Raises:
            AdapterError: the layer was merged with the whole model, or beside an adapter that was deleted since.
        """
        innermost = layers_at(self)[-1]
        if self in innermost.merged_layers:
            innermost._merge_only([layer for layer in innermost.merged_layers if layer is not self])
        elif self.merged_adapters:
            raise AdapterError(f"{self.adapter} was not merged by this layer alone", hint="call unmerge_adapter()")

    def _merge_only(self, layers: list[Any]) -> None:
        """Of the innermost layer on a module: merge these of those on it into its weights, and no others."""
        merged = [(module, name, getattr(module, name)) for module, name, _ in self.before_merging]
        for change in self.before_merging:
            put_back(*change)
        changes = []
        if layers:
            top = max(layers, key=lambda layer: len(layers_at(layer)))
            enabled = {layer: layer.enabled for layer in top.modules() if isinstance(layer, PeftLayerMixin)}
            try:
                for layer in enabled:
                    layer.enabled = layer in layers
                changes = top.folded_weights(type(self.get_base_layer()).__name__)
            except AdapterError:
                for module, name, value in merged:
                    setattr(module, name, value)
                raise
            finally:
                for layer, was in enabled.items():
                    layer.enabled = was
        for module, name, _, value in changes:
            setattr(module, name, value)
        for layer in {*self.merged_layers, *layers}:
            layer.merged_adapters = [layer.adapter] if layer in layers else []
            layer.enabled = layer not in layers and layer.adapter in layer.active_adapters
        self.merged_layers, self.before_merging = layers, [change[:3] for change in changes]

    def delete_adapter(self: Any, adapter_name: str) -> None:
        """Become an empty layer if that is the layer's adapter; one that is merged stays in the base weights.

        If it was the only active one, the first adapter that is left on the module becomes active. The empty layer goes
        when the next adapter comes.
        """
        stack = layers_at(self)
        left = [name for name in self.active_adapters if name != adapter_name]
        others = [layer.adapter for layer in stack if layer.adapter not in ("", adapter_name)]
        if self.adapter == adapter_name:
            if self.merged_adapters:
                stack[-1].merged_layers, stack[-1].before_merging = [], []
            self.give_up()
            self.active_adapters = left or others[-1:]
        elif left:
            self.active_adapters = left
        elif self.active_adapters:
            self.set_adapter(others[-1:])

    def adapter_state_dict_load_map(self: Any, adapter_name: str) -> dict[str, str]:
        """Return where transformers' ``load_adapter`` puts tensors: name below the layer, in the file -> in the model.

        Raises:
            AdapterError: a tensor of the file belongs to several layers, or the layer does not hold it as it is.
        """
        if adapter_name != self.adapter:
            return {}
        held = {id(value): name for name, value in [*self.named_parameters(), *self.named_buffers()]}
        start, places = f"{self.file_prefix}layer.", {}
        for tensor, value in self.file_tensors().items():
            name, place = self.file_name("layer", tensor), held.get(id(value))
            if not name.startswith(start) or place is None:
                message = f"load_adapter of transformers cannot read {tensor}"
                raise AdapterError(message, hint="use PeftModel.from_pretrained")
            places[name.removeprefix(start)] = place
        return {name: place for name, place in places.items() if name != place}


class PeftCopyMixin:
    """PEFT's attributes of a module of modules_to_save."""

    @property
    def original_module(self: Any) -> Any:
        """The base model's module."""
        return self.get_base_layer()

    @property
    def modules_to_save(self) -> nn.ModuleDict:
        """The copies of the module: adapter -> its copy."""
        copies: list[Any] = [layer for layer in layers_at(self) if isinstance(layer, PeftCopyMixin)]
        return nn.ModuleDict({layer.adapter: layer.copy for layer in copies})


def name_of_size(module: Any, name: str) -> str:
    """Return what ``module`` calls ``in_features`` or ``out_features``; any other name as it is."""
    return next((each for each in _SAME_SIZE.get(name, ()) if hasattr(module, each)), name)


def put_back(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Set a weight or buffer of a module to what it was, in the dtype and on the device of what is there by now."""
    there = getattr(module, name)
    if tensor.is_meta == there.is_meta:  # else there is no value to put back
        tensor.data = tensor.data.to(there)
        setattr(module, name, tensor)


def layers_at(module: Any) -> list[Any]:
    """Return the adapter layers that stand at ``module``, outermost first."""
    found = []
    while isinstance(module, PeftLayerMixin):
        found.append(module)
        module = module.base_layer  # type: ignore[attr-defined]
    return found
