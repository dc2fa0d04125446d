"""The virtual tokens of prompt tuning (https://arxiv.org/abs/2104.08691)."""

from __future__ import annotations

from typing import Any

import torch

from peftcli.core.prompt import VirtualTokens
from peftcli.errors import AdapterError
from peftcli.methods.prompt_tuning.config import PromptTuningConfig


def wrap(module: Any, config: PromptTuningConfig) -> VirtualTokens:
    """Virtual tokens over the input embedding ``module``, started as the config says."""
    width = module.weight.shape[1]
    if config.token_dim is not None and config.token_dim != width:
        raise AdapterError(f"the adapter's is {config.token_dim}, the base model's {width}", key="token_dim")
    config.token_dim, config.num_transformer_submodules = width, 1
    return VirtualTokens(module, _start(module, config))


@torch.no_grad()
def _start(module: Any, config: PromptTuningConfig) -> torch.Tensor:
    """The vectors (n, D) that training starts from; a loaded adapter's replace them."""
    count, (vocabulary, width), device = config.num_virtual_tokens, module.weight.shape, module.weight.device
    if config.prompt_tuning_init == "RANDOM" or config.inference_mode:
        return torch.randn(count, width, device=device)
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        ids = torch.randint(vocabulary, (count,)).tolist()
    elif config.init_token_ids:
        ids = [config.init_token_ids[index % len(config.init_token_ids)] for index in range(count)]
    else:
        raise AdapterError(
            "the text was not turned into token ids; call prepare() first", key="prompt_tuning_init_text"
        )
    vectors: torch.Tensor = module(torch.tensor(ids, device=device))  # not the weight's rows, which some models scale
    return vectors
