"""Which layer a variant of LoRA has, and what the variants add to the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer, adapter_layers
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
    layers = [layer for layer in adapter_layers(model).values() if layer.enabled]
    return _kasa_penalty(layers) if config.kasa_config else _monteclora_penalty(layers)


def model_attributes(model: nn.Module, configs: Mapping[str, LoraConfig]) -> dict[str, Any]:
    """Return the methods of a model with LoRA, under PEFT's names: what to add to the loss."""

    def loss_of(kind: Any, adapter_names: str | Sequence[str] | None = None) -> torch.Tensor | float:
        """Return the penalty of these adapters, or of the active ones; 0.0 where there is none."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        layers = adapter_layers(model).values()
        found = kind([each for each in layers if each.adapter in (each.active_adapters if names is None else names)])
        return 0.0 if found is None else found

    return {
        "_get_kasa_loss": partial(loss_of, _kasa_penalty),
        "_get_monteclora_loss": partial(loss_of, _monteclora_penalty),
    }


def _kasa_penalty(layers: Sequence[AdapterLayer]) -> torch.Tensor | None:
    """Return the sum over the KaSA layers among these, or None."""
    parts = [layer.penalty() for layer in layers if isinstance(layer, KasaLinear)]
    return torch.stack(parts).sum() if parts else None


def _monteclora_penalty(layers: Sequence[AdapterLayer]) -> torch.Tensor | None:
    """Return the mean over the MonteCLoRA layers among these that train, or None."""
    trained = [layer for layer in layers if isinstance(layer, MontecloraLinear) and layer.training]
    parts = [layer.lora_monteclora_sampler.penalty() for layer in trained]
    return torch.stack(parts).mean() if parts else None
