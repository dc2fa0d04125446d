"""Start a LoRA adapter from the training data, with the adapter disabled and the model in eval mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from peftcli.core.inject import disabled
from peftcli.errors import AdapterError
from peftcli.methods.lora.config import LoraConfig
from peftcli.methods.lora.initialisations.corda import covariances
from peftcli.methods.lora.initialisations.eva import eva_directions, start_eva
from peftcli.methods.lora.initialisations.lora_ga import gradients
from peftcli.methods.lora.initialisations.residual import ResidualLinear
from peftcli.methods.lora.initialisations.statistics import PADDED, Batches
from peftcli.methods.lora.lora import lora_layers

_CORDA_EXAMPLES = 256
"""As many as the paper takes."""
_LORA_GA_EXAMPLES = 64
"""As many as the paper's code takes."""


def calibrate(model: nn.Module, config: LoraConfig, batches: Batches) -> None:
    """Start the model's LoRA layers as ``config.init_lora_weights`` says: eva, corda or lora_ga.

    Raises:
        AdapterError: the data do not suffice, or do not reach a layer.
    """
    layers = lora_layers(model)
    if config.init_lora_weights == "eva":
        start_eva(model, config, layers, eva_directions(model, config, layers, batches))
        return

    def forward() -> None:
        for batch in _first(batches, _CORDA_EXAMPLES):
            model(**batch)

    def backward() -> None:
        for batch in _first(batches, _LORA_GA_EXAMPLES):
            loss = getattr(model(**batch), "loss", None)
            if loss is None:
                message = "lora_ga starts from gradients of the model's own loss, and the task has another"
                raise AdapterError(message, key="init_lora_weights")
            # the mean of a batch's targets counts as often as it has targets, as in training
            labels = batch.get("labels")
            targets = len(next(iter(batch.values()))) if labels is None else int((labels != PADDED).sum())
            (loss * targets).backward()

    started = {name: layer for name, layer in layers.items() if isinstance(layer, ResidualLinear)}
    with disabled(model):
        if config.init_lora_weights == "corda":
            found = covariances(model, started, forward)
        else:
            found = gradients(model, started, backward)
    for name, layer in started.items():
        layer.start_from(found[name], config)


def _first(batches: Batches, examples: int) -> Iterator[Mapping[str, torch.Tensor]]:
    """Return the first batches that hold ``examples`` together."""
    for batch in batches:
        if examples <= 0:
            return
        examples -= len(next(iter(batch.values())))
        yield batch
