"""The virtual tokens of p-tuning (https://arxiv.org/abs/2103.10385)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftcli.core.inject import evaluating
from peftcli.core.layer import adapter_dtype
from peftcli.core.prompts.virtual_tokens import TrainedTokens, VirtualTokens
from peftcli.core.prompts.virtual_tokens import attach as attach
from peftcli.core.prompts.virtual_tokens import targets as targets
from peftcli.methods.p_tuning import PromptEncoderConfig


class PromptEncoder(nn.Module):
    """Makes the vectors (n, D) from an embedding (n, D): by an MLP, or by an LSTM in both directions and an MLP."""

    def __init__(self, width: int, config: PromptEncoderConfig):
        super().__init__()
        hidden = config.encoder_hidden_size or width
        self.embedding = nn.Embedding(config.num_virtual_tokens, width)
        self.lstm_head: nn.LSTM | None = None
        if config.encoder_reparameterization_type == "LSTM":
            layers, dropout = config.encoder_num_layers, config.encoder_dropout
            self.lstm_head = nn.LSTM(width, hidden, layers, batch_first=True, dropout=dropout, bidirectional=True)
            both = 2 * hidden
            self.mlp_head = nn.Sequential(nn.Linear(both, both), nn.ReLU(), nn.Linear(both, width))
        else:
            self.mlp_head = nn.Sequential(
                nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
            )

    def forward(self) -> torch.Tensor:
        x = self.embedding.weight
        if self.lstm_head is not None:
            x = self.lstm_head(x)[0]
        return self.mlp_head(x)


class EncodedTokens(VirtualTokens):
    """Virtual tokens whose vectors a network makes; the network trains, the vectors are saved."""

    def __init__(self, base_layer: nn.Module, config: PromptEncoderConfig):
        super().__init__(base_layer, config.num_virtual_tokens)
        weight = self.base_layer.weight
        encoder = PromptEncoder(config.fit(base_layer), config)
        self.prompt_encoder = encoder.to(weight.device, adapter_dtype(weight))

    def table(self) -> torch.Tensor:
        # in full precision: the file holds what training used
        with torch.autocast(self.prompt_encoder.embedding.weight.device.type, enabled=False):
            vectors: torch.Tensor = self.prompt_encoder()
        return vectors

    def file_tensors(self) -> dict[str, torch.Tensor]:
        with evaluating(self.prompt_encoder):
            return {"prompt_embeddings": self.table()}


def wrap(module: Any, name: str, config: PromptEncoderConfig) -> VirtualTokens:
    """Virtual tokens over the input embedding ``module``: with their encoder, or as a file holds them."""
    if not config.inference_mode:
        return EncodedTokens(module, config)
    width = config.fit(module)
    return TrainedTokens(module, torch.zeros(config.num_virtual_tokens, width, device=module.weight.device))
