"""LoRA adapters that start from the base weight or from data, over tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from models_tiny import PAD, batch, tiny
from torch import nn

from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.core.protocols import needs_batches
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.layers import calibrate
from peftcli.methods.lora.lora import LoraLayer

FROM_WEIGHT = ("pissa", "pissa_niter_4", "olora")
FROM_DATA = ("corda", "lora_ga")
STARTED = (*FROM_WEIGHT, *FROM_DATA)
"""Those whose B A is not zero at the start."""
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "t5": ["q", "wo"]}


class Rows:
    """Batches that can be gone through more than once; the last rows of each are padded on the right."""

    def __init__(self, kind: str, filler: int = PAD, rows: int = 4, length: int = 20, count: int = 4):
        self.batches = [labelled_rows(kind, seed, filler, rows, length) for seed in range(count)]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(self.batches)


def labelled_rows(kind: str, seed: int, filler: int, rows: int, length: int) -> dict[str, torch.Tensor]:
    inputs = {**batch(kind, seed, rows, length)}
    inputs.pop("decoder_input_ids", None)
    labels = batch(kind, seed + 50, rows, 9)["input_ids"] if kind == "t5" else inputs["input_ids"].clone()
    inputs["input_ids"][-1, -5:] = filler
    inputs["attention_mask"][-1, -5:] = 0
    labels[-1, -5:] = -100
    labels[:, :2] = labels[:, :2] if kind == "t5" else -100
    return inputs | {"labels": labels}


def started(kind: str, init: bool | str, **settings: Any) -> tuple[nn.Module, LoraConfig]:
    """A tiny model with an adapter that has seen what it starts from."""
    torch.manual_seed(0)
    settings.setdefault("target_modules", TARGETS[kind])
    model, config = tiny(kind), LoraConfig(init_lora_weights=init, **{"r": 4, **settings})
    inject(model, config)
    if needs_batches(config):
        calibrate(model, config, Rows(kind))
    return model, config


def layers_of(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in adapter_layers(model).items() if isinstance(layer, LoraLayer)}


class EightBits(nn.Linear):
    """A linear layer as bitsandbytes stores one in 8 bits, with coarser steps."""

    def __init__(self, dense: nn.Linear):
        super().__init__(dense.in_features, dense.out_features, bias=False)
        scale = dense.weight.detach().abs().amax(1)
        steps = (dense.weight.detach() / scale[:, None] * 7).round() / 7 * 127
        self.weight = nn.Parameter(steps.round().to(torch.int8), requires_grad=False)
        self.weight.SCB = scale  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.float() * (self.weight.SCB / 127)[:, None]).T  # type: ignore[attr-defined]
