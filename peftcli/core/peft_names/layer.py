"""What every adapter layer can do under PEFT's names: be switched, and say how a file's tensors are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftcli.errors import AdapterError


class PeftLayerMixin:
    """PEFT's attributes and methods of an ``AdapterLayer``. Libraries call them on each layer of a model."""

    active_adapters: list[str]
    """Names of the model's active adapters. While they are disabled they are active too."""
    merged_adapters: list[str]
    """The name of the layer's adapter while that is merged into the base weights."""

    @property
    def active_adapter(self) -> str | list[str]:
        """Name of the model's active adapter; a list, unless there is exactly one."""
        return self.active_adapters[0] if len(self.active_adapters) == 1 else list(self.active_adapters)

    @property
    def disable_adapters(self: Any) -> bool:
        """Whether the layer's adapter is active and switched off."""
        return self.adapter in self.active_adapters and not self.enabled and not self.merged_adapters

    def set_adapter(self: Any, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Enable the layer if its adapter is one of these, and let its weights train; else the reverse.

        Args:
            adapter_names: the active adapters of the model: one name or several.
            inference_mode: freeze the weights in any case.

        Raises:
            AdapterError: the layer would override that of another of these adapters.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check_active(names)
        self.active_adapters = names
        self.enabled = self.adapter in names
        for parameter in self.own_tensors().values():
            parameter.requires_grad_(self.enabled and not inference_mode)

    def enable_adapters(self: Any, enabled: bool) -> None:
        """Disable the layer, or enable it again if its adapter is an active one."""
        self.enabled = enabled and self.adapter in self.active_adapters

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
                told = f"load_adapter of transformers cannot read {tensor}"
                raise AdapterError(told, hint="use PeftModel.from_pretrained")
            places[name.removeprefix(start)] = place
        return {name: place for name, place in places.items() if name != place}
