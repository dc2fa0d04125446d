"""The virtual tokens of prompt tuning (https://arxiv.org/abs/2104.08691)."""

from __future__ import annotations

from typing import Any

import torch

from peftcli.core.layer import base_module
from peftcli.core.prompts.virtual_tokens import TrainedTokens
from peftcli.core.prompts.virtual_tokens import attach as attach
from peftcli.core.prompts.virtual_tokens import targets as targets
from peftcli.errors import AdapterError
from peftcli.methods.prompt_tuning import PromptTuningConfig, TextPromptConfig


def wrap(module: Any, name: str, config: PromptTuningConfig) -> TrainedTokens:
    """Virtual tokens over the input embedding ``module``, started as the config says."""
    config.fit(module)
    return TrainedTokens(module, start(module, config))


@torch.no_grad()
def start(module: Any, config: TextPromptConfig) -> torch.Tensor:
    """The vectors (n, D) that training starts from; a loaded adapter's replace them."""
    embedding = base_module(module)
    count, (vocabulary, width), device = config.num_virtual_tokens, embedding.weight.shape, embedding.weight.device
    if config.prompt_tuning_init == "SAMPLE_VOCAB" and not config.inference_mode:
        ids = torch.randint(vocabulary, (count,)).tolist()
    elif config.prompt_tuning_init == "TEXT" and not config.inference_mode:
        if not config.init_token_ids:
            raise AdapterError(
                "the text was not turned into token ids; call prepare() first", key="prompt_tuning_init_text"
            )
        ids = [config.init_token_ids[index % len(config.init_token_ids)] for index in range(count)]
    else:
        return torch.randn(count, width, device=device)
    vectors: torch.Tensor = embedding(torch.tensor(ids, device=device))  # not the rows, which some models scale
    return vectors
