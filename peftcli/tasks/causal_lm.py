"""Causal language modelling: predict the next token of a text, a completion or an assistant's answer.

A row: ``{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}``
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from peftcli.data.store import Feature
from peftcli.schema import Dataset, Source
from peftcli.tasks.base import Batch, Losses
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.collate import pad_causal, pad_token_id
from peftcli.tasks.text.encode import COLUMNS, CausalEncoder
from peftcli.tasks.text.formats import example_reader
from peftcli.tasks.text.token_loss import token_losses, token_metrics


class CausalLM:
    """The task ``causal_lm``."""

    feature_columns = COLUMNS

    def encoder(
        self, columns: Sequence[str], source: Source, described: str, tokenizer: Any, dataset: Dataset
    ) -> CausalEncoder:
        return CausalEncoder(example_reader(columns, source, described), tokenizer, dataset)

    def collate(self, features: Sequence[Feature], tokenizer: Any) -> Batch:
        return pad_causal(features, pad_token_id(tokenizer))

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        targets = batch["labels"][:, 1:]  # (B, T - 1): position t predicts token t + 1
        inputs: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels"}
        length = targets.shape[1]
        if _picks_logits(model):
            # logits only where some row has a target; counted from the end, since a soft prompt lengthens the front
            kept = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
            inputs["logits_to_keep"] = kept - (length + 1)
            logits = model(**inputs, use_cache=False).logits
            targets = targets[:, kept]
        else:
            if "position_ids" in inputs:
                inputs["use_cache"] = False  # transformers looks for packed examples only where there is no cache
            logits = model(**inputs).logits[:, -(length + 1) : -1]
        return token_losses(logits, targets)

    def metrics(self, sums: Mapping[str, float], num_targets: int) -> dict[str, float]:
        return token_metrics(sums, num_targets)


def _picks_logits(model: nn.Module) -> bool:
    """Whether the model, below any wrapper of accelerate's, computes logits at chosen positions only."""
    inner = getattr(model, "module", model)
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


TASK = CausalLM()
