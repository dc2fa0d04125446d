"""Causal language modelling: predict the next token of a text, a completion or an assistant's answer.

A row: ``{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}``
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from peftcli.data.store import Example
from peftcli.tasks import settings
from peftcli.tasks.base import Batch, Loss
from peftcli.tasks.shown import Text
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.encode import CausalEncoder
from peftcli.tasks.text.language_model import LanguageModel
from peftcli.tasks.text.packing import join
from peftcli.tasks.text.token_loss import next_tokens, target_losses, token_loss

_SAMPLE = 8
"""Tokens of the examples that the packing check compares."""


class CausalLM(LanguageModel[settings.CausalLM]):
    """The task ``causal_lm``."""

    encoder = CausalEncoder

    def texts(self, ids: list[int], labels: list[int]) -> list[Text]:
        # a causal model never predicts the first token
        return [Text(self.renderer.render(ids, [IGNORED, *labels[1:]]))]

    def join(self, examples: Sequence[Example]) -> Example:
        return join(examples)

    def samples(self) -> list[Example]:
        vocabulary = self.base.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(vocabulary, (2, _SAMPLE), generator=generator).tolist()
        return [Example({"input_ids": row, "labels": row}, _SAMPLE, _SAMPLE - 1) for row in rows]

    def loss_of_targets(self, model: nn.Module, inputs: Batch) -> Loss:
        given = {key: value for key, value in inputs.items() if key != "labels"}
        return token_loss(target_losses(model, given, next_tokens(inputs["labels"])))


TASK = CausalLM
