"""Which layer a variant of LoRA has, and what the variants add to the loss."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from peftcli.core.layer import adapter_layers, base_module
from peftcli.core.linear import linear_view
from peftcli.errors import AdapterError
from peftcli.methods.lora.alora import ALoraLinear
from peftcli.methods.lora.bdlora import BdLoraLinear
from peftcli.methods.lora.config import LoraConfig
from peftcli.methods.lora.kasa import KasaLinear
from peftcli.methods.lora.lora import LoraLinear
from peftcli.methods.lora.monteclora import MontecloraLinear
from peftcli.methods.lora.qalora import QaLoraLinear
from peftcli.methods.lora.variant_settings import variant_of
from peftcli.methods.lora.velora import VeloraLinear

LAYERS: dict[str, type[LoraLinear]] = {
    "alora_invocation_tokens": ALoraLinear,
    "use_bdlora": BdLoraLinear,
    "use_qalora": QaLoraLinear,
    "kasa_config": KasaLinear,
    "monteclora_config": MontecloraLinear,
    "velora_config": VeloraLinear,
}
"""The field that switches a variant on -> its layer."""


def check_variant(module: nn.Module, name: str, config: LoraConfig) -> None:
    """Raises AdapterError for a module that the config's variant does not adapt."""
    variant, base = variant_of(config), base_module(module)
    if variant and (linear_view(module) is None or isinstance(base, NonDynamicallyQuantizableLinear)):
        raise AdapterError(f"adapts linear layers; {name} is a {type(base).__name__}", key=variant)


def penalty(model: nn.Module, config: LoraConfig) -> torch.Tensor | None:
    """Return what KaSA, summed over its layers, and MonteCLoRA, averaged over its layers, add to the loss."""
    layers = [layer for layer in adapter_layers(model).values() if layer.enabled]
    kasa = [layer.penalty() for layer in layers if isinstance(layer, KasaLinear)]
    sampled = [layer.lora_monteclora_sampler.penalty() for layer in layers if isinstance(layer, MontecloraLinear)]
    parts = [torch.stack(kasa).sum()] if kasa else []
    parts += [torch.stack(sampled).mean()] if sampled else []
    return sum(parts[1:], parts[0]) if parts else None
