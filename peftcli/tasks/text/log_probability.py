"""The log-probability of a continuation after a context, as a language model sees both with its adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from peftcli.tasks.base import on_device
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.language_model import target_losses
from peftcli.tasks.text.token_ids import next_tokens, pad_texts, padded

TokenPair = tuple[Sequence[int], Sequence[int]]
"""The tokens of a context, at least one, and those of its continuation."""


class Scored(NamedTuple):
    """What a model thinks of a continuation."""

    log_probability: float
    """The sum over its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the model's first choice."""


def score_continuations(model: Any, pairs: Sequence[TokenPair], pad_token_id: int) -> list[Scored]:
    """Score continuations after their contexts, in one batch.

    Rows are padded on the right and masked, so that virtual tokens stand before the first token of each; their own
    positions are never scored. An encoder-decoder reads the context in its encoder.
    """
    contexts, wanted = zip(*pairs, strict=True)
    if model.config.is_encoder_decoder:
        targets = padded(wanted, IGNORED)
        batch = pad_texts(contexts, pad_token_id)
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(targets.clone())
    else:
        batch = pad_texts([[*before, *after] for before, after in pairs], pad_token_id)
        targets = next_tokens(padded([[IGNORED] * len(before) + [*after] for before, after in pairs], IGNORED))
    batch = on_device({**batch, "targets": targets}, model.device)
    targets = batch.pop("targets")
    with torch.inference_mode():
        losses, first = target_losses(model, batch, targets)
    sizes = [len(after) for after in wanted]
    parts = zip(losses.double().split(sizes), first.split(sizes), strict=True)
    return [Scored(-float(loss.sum()), bool(right.all())) for loss, right in parts]
