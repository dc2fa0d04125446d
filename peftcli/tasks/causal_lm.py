"""Causal language modelling: predict the next token of a text, a completion or an assistant's answer.

A row: ``{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from peftcli.data.store import Example
from peftcli.models.open import OpenBase
from peftcli.tasks import settings
from peftcli.tasks.base import Batch, Loss, model_inputs
from peftcli.tasks.shown import Text
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.encode import CausalEncoder
from peftcli.tasks.text.language_model import Encoder, LanguageModel, refuse_later_tokens, target_losses
from peftcli.tasks.text.middle import MiddleEncoder, middle_tokens
from peftcli.tasks.text.token_ids import next_tokens, token_loss

Settings = TypeVar("Settings", bound=settings.CausalLMSettings)
_SAMPLE = 8
"""Tokens of the examples that the packing check compares."""


class CausalLM(LanguageModel[Settings]):
    """The task ``causal_lm``."""

    name = "causal_lm"
    encoder = CausalEncoder

    def __init__(self, settings: Settings, processor: Any, base: OpenBase):
        super().__init__(settings, processor, base)
        if settings.train_on == "middle":
            middle_tokens(processor, base.name)

    def encoder_of(self, reader: Any) -> Encoder:
        if self.settings.train_on != "middle":
            return super().encoder_of(reader)
        return MiddleEncoder(reader, self.processor, self.settings, self.base.name)

    def texts(self, ids: list[int], labels: list[int]) -> list[Text]:
        # a causal model never predicts the first token
        return [Text(self.renderer.render(ids, [IGNORED, *labels[1:]]))]

    def check_model(self, model: nn.Module) -> None:
        refuse_later_tokens(model, self.probe())

    def join(self, examples: Sequence[Example]) -> Example:
        # the first label of each does not count, since it would be predicted from the previous example
        arrays = {
            "input_ids": np.concatenate([each.arrays["input_ids"] for each in examples]),
            "labels": np.concatenate([[IGNORED, *each.arrays["labels"][1:]] for each in examples]),
            "position_ids": np.concatenate([np.arange(len(each.arrays["input_ids"])) for each in examples]),
        }
        return Example(arrays, sum(each.size for each in examples), sum(each.num_targets for each in examples))

    def samples(self) -> list[Example]:
        vocabulary = self.base.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(vocabulary, (2, _SAMPLE), generator=generator).tolist()
        return [Example({"input_ids": row, "labels": row}, _SAMPLE, _SAMPLE - 1) for row in rows]

    def loss_of_targets(self, model: nn.Module, batch: Batch) -> Loss:
        given = {name: value for name, value in model_inputs(batch).items() if name != "labels"}
        return token_loss(target_losses(model, given, next_tokens(batch["labels"])))


TASK = CausalLM
