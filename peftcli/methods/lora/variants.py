"""Which layer a variant of LoRA has, and what the variants add to the loss."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from peftcli.core.layer import adapter_layers
from peftcli.methods.lora.alora import ALoraLinear
from peftcli.methods.lora.bdlora import BdLoraLinear
from peftcli.methods.lora.config import LoraConfig
from peftcli.methods.lora.initialisations.loftq import LoftQLinear
from peftcli.methods.lora.kasa import KasaLinear
from peftcli.methods.lora.lora import LoraLinear
from peftcli.methods.lora.monteclora import MontecloraLinear
from peftcli.methods.lora.qalora import QaLoraLinear
from peftcli.methods.lora.velora import VeloraLinear

LAYERS: dict[str, type[LoraLinear]] = {
    "alora_invocation_tokens": ALoraLinear,
    "use_bdlora": BdLoraLinear,
    "use_qalora": QaLoraLinear,
    "kasa_config": KasaLinear,
    "monteclora_config": MontecloraLinear,
    "velora_config": VeloraLinear,
    "loftq_config": LoftQLinear,
}
"""The field that switches a variant on -> its layer."""


def penalty(model: nn.Module, config: LoraConfig) -> torch.Tensor | None:
    """Return what the enabled layers of KaSA or MonteCLoRA, whichever the config has, add to the loss."""
    if config.kasa_config is None and config.monteclora_config is None:
        return None
    names = {layer.adapter for layer in adapter_layers(model).values() if layer.enabled}
    return kasa_penalty(model, names) if config.kasa_config else monteclora_penalty(model, names)


def kasa_penalty(model: nn.Module, adapters: Collection[str]) -> torch.Tensor | None:
    """Return the sum over the KaSA layers of these adapters, or None."""
    layers = [layer for layer in adapter_layers(model).values() if layer.adapter in adapters]
    parts = [layer.penalty() for layer in layers if isinstance(layer, KasaLinear)]
    return torch.stack(parts).sum() if parts else None


def monteclora_penalty(model: nn.Module, adapters: Collection[str]) -> torch.Tensor | None:
    """Return the mean over the MonteCLoRA layers of these adapters, or None."""
    layers = [layer for layer in adapter_layers(model).values() if layer.adapter in adapters]
    parts = [layer.lora_monteclora_sampler.penalty() for layer in layers if isinstance(layer, MontecloraLinear)]
    return torch.stack(parts).mean() if parts else None
