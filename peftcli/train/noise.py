"""NEFTune (https://arxiv.org/abs/2310.05914): noise on the embeddings of the tokens while a model trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftcli.core.layer import base_module, model_ends
from peftcli.core.prompts.inputs import SoftPrompt
from peftcli.errors import ModelError
from peftcli.tasks.text.unpadded import lengths_in_row


def add_embedding_noise(model: nn.Module, alpha: float) -> None:
    """Let training add to each number of a token's embedding one drawn evenly from ± alpha / sqrt(T * D).

    T is the length of the token's example where the model computes no padding, otherwise of the longest example of the
    batch; D is the size of an embedding. Virtual tokens get no noise.

    Raises:
        ModelError: the model has no embedding of tokens.
    """
    embedding = model_ends(model)[0]
    if not isinstance(base_module(embedding), nn.Embedding):
        raise ModelError("there is no embedding of tokens in the model", key="training.neftune_noise_alpha")
    while isinstance(embedding, SoftPrompt):
        embedding = embedding.base_layer

    def add_noise(module: nn.Module, args: Any, embedded: torch.Tensor) -> torch.Tensor | None:
        if not module.training:
            return None
        length: Any = lengths_in_row(embedded.device)
        length = embedded.shape[1] if length is None else length[None, :, None]
        return embedded + torch.empty_like(embedded).uniform_(-1, 1).mul_(alpha * (length * embedded.shape[2]) ** -0.5)

    embedding.register_forward_hook(add_noise)
