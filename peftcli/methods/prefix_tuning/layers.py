"""The prefix of prefix tuning (https://arxiv.org/abs/2101.00190)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import AdapterLayer
from peftcli.core.prompts.prefix import Prefix, TrainedPrefix, insert_prefix
from peftcli.core.prompts.prefix import targets as targets
from peftcli.core.prompts.prefix import wrap as wrap
from peftcli.methods.prefix_tuning import PrefixTuningConfig


class ProjectedPrefix(Prefix):
    """Keys and values that a network makes of an embedding (n, width); the network trains, they are saved."""

    def __init__(self, count: int, pairs: int, width: int, hidden: int):
        super().__init__(count, pairs, width)
        self.embedding = nn.Embedding(count, width)
        self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, pairs * 2 * width))

    def pair(self, index: int) -> torch.Tensor:
        first, tanh, last = self.transform
        weight, bias = list(last.parameters())
        rows = slice(index * 2 * self.width, (index + 1) * 2 * self.width)
        # in full precision: the file holds what training used
        with torch.autocast(weight.device.type, enabled=False):
            return F.linear(tanh(first(self.embedding.weight)), weight[rows], bias[rows])


def attach(model: nn.Module, config: PrefixTuningConfig, layers: Mapping[str, AdapterLayer]) -> None:
    """Let the new layers share a prefix, and the model's inputs make room for it."""
    assert config.num_layers is not None
    assert config.token_dim is not None
    insert_prefix(model, layers, prefix(config, config.num_layers, config.token_dim))


@torch.no_grad()
def prefix(config: PrefixTuningConfig, pairs: int, width: int) -> Prefix:
    """The prefix, started as the config says, or as a file holds it."""
    count, made = config.num_virtual_tokens, config.prefix_projection and not config.inference_mode
    if not made:
        plain = TrainedPrefix(count, pairs, width)
        return plain if config.init_weights is None else _zeroed(plain)
    projected = ProjectedPrefix(count, pairs, width, config.encoder_hidden_size or width)
    if config.init_weights == "zero":
        _zeroed(projected.transform[2])
    return projected


def _zeroed(module: Any) -> Any:
    for parameter in module.parameters():
        parameter.zero_()
    return module
