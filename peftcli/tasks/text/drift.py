"""How far an adapter moves a language model on given texts: the loss of each token with and without it, and the KL.

The model without the adapter is the same one with its adapter layers disabled, so no second model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from peftcli.core.inject import disabled
from peftcli.core.prompts.config import max_positions
from peftcli.errors import DataError
from peftcli.models.probe import probing
from peftcli.tasks.base import Batch, Task, on_device
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.fast.losses import OutputHead, output_head
from peftcli.tasks.text.prompts import prompt_ids
from peftcli.tasks.text.spans import tokenize
from peftcli.tasks.text.token_ids import inner_model, next_tokens, no_cache, pad_texts, pad_token_id, padded

MEASURES = ("tokens", "base_loss", "adapter_loss", "kl", "kept")
"""What ``drift`` sums over the tokens of a text."""
_LONGEST = 256
"""Tokens of a text that are read. Tokenizers of bytes make many of a short one."""
_ROWS = {"cpu": 64}
_MORE_ROWS = 512
"""Rows of logits at once, on a CPU and elsewhere."""
_TEXTS, _TEXTS_OF_WHOLE_LOGITS = 8, 1
"""Texts at once; where the logits cannot be made a few rows at a time, one."""


def drift(model: nn.Module, task: Task[Any], texts: Sequence[Any], *, divided: bool = False) -> torch.Tensor:
    """Compare a model with its base on texts and conversations, token by token after the right tokens before it.

    The model's modes and the random state are left as they were.

    Args:
        model: Has the adapter, and may have a soft prompt.
        task: Of the model: one that writes text.
        texts: Each a string, or a list of messages, which goes through the base model's own chat template.
        divided: Whether the model's weights are divided among processes, all of which call this.

    Returns:
        ``MEASURES`` of each text, (N, 5), float64 on the CPU; ``kept`` counts tokens that are the first choice of both.
    """
    read = _read_pair if task.base.config.is_encoder_decoder else _read_text
    pairs = [read(text, task) for text in texts]
    device, found = next(model.parameters()).device, torch.zeros(len(texts), len(MEASURES), dtype=torch.float64)
    order = sorted(range(len(texts)), key=lambda at: len(pairs[at][0]) + len(pairs[at][1]))
    with probing(model, device):
        few = on_device(_inputs(model, pairs[:1], task)[0], device)
        head = None if divided else output_head(inner_model(model), few)
        size = _TEXTS if head is not None else _TEXTS_OF_WHOLE_LOGITS
        for start in range(0, len(order), size):
            some = order[start : start + size]
            inputs, targets = _inputs(model, [pairs[at] for at in some], task)
            found[some] = _compare(model, on_device(inputs, device), targets.to(device), head)
    return found


def _read_text(text: Any, task: Task[Any]) -> tuple[list[int], list[int]]:
    """The tokens of a text, each of which but the first is a target."""
    ids = None
    if not isinstance(text, str) and task.processor.chat_template and task.base.spec.chat_template is None:
        with suppress(DataError):  # a template for other conversations than plain ones
            ids = tokenize(task.processor, text, None)
    if ids is None:
        ids = prompt_ids(_plain(text), task.processor, templated=False, decoder_only=True)
    longest = max_positions(task.base.config.get_text_config(), task.virtual_tokens) or _LONGEST
    return ids[: min(longest, _LONGEST)], []


def _read_pair(text: Any, task: Task[Any]) -> tuple[list[int], list[int]]:
    """The tokens of the first half of a text, which an encoder reads, and those of the second, the targets."""
    text = _plain(text)
    middle = text.find(" ", len(text) // 2)
    middle = middle if middle > 0 else len(text) // 2
    longest = min(max_positions(task.base.config.get_text_config(), task.virtual_tokens) or _LONGEST, _LONGEST)
    first = task.processor(text[:middle], verbose=False)["input_ids"]
    second = task.processor(text_target=text[middle:].strip(), verbose=False)["input_ids"]
    return first[:longest], second[:longest]


def _plain(text: Any) -> str:
    """A text, or a conversation as one."""
    return text if isinstance(text, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in text)


def _inputs(
    model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]], task: Task[Any]
) -> tuple[Batch, torch.Tensor]:
    """Return the model's arguments for some texts, and the targets (B, T) of its last T positions."""
    inputs: Batch = pad_texts([first for first, _ in pairs], pad_token_id(task.processor))
    if not task.base.config.is_encoder_decoder:
        return inputs, next_tokens(padded([first for first, _ in pairs], IGNORED))
    labels = padded([second for _, second in pairs], IGNORED)
    shift = getattr(inner_model(model), "prepare_decoder_input_ids_from_labels", None)
    given = {"labels": labels} if shift is None else {"decoder_input_ids": shift(labels.clone())}
    return inputs | given, labels


def _compare(model: nn.Module, inputs: Batch, targets: torch.Tensor, head: OutputHead | None) -> torch.Tensor:
    """Return ``MEASURES`` of each text of a batch, (B, 5)."""
    counts = targets != IGNORED
    logits: Callable[[torch.Tensor], torch.Tensor] = (lambda given: given) if head is None else head.logits
    own = _states(model, inputs, counts, head)
    with disabled(model):
        base = _states(model, inputs, counts, head)
    size, parts = _ROWS.get(own.device.type, _MORE_ROWS), []
    for now, before, wanted in zip(own.split(size), base.split(size), targets[counts].split(size), strict=True):
        after = logits(now).float().log_softmax(-1)
        with disabled(model):
            first = logits(before).float().log_softmax(-1)
        # a token that the base model excludes adds nothing, whatever the adapter says of it
        kl = torch.where(first.isneginf(), 0.0, first.exp() * (first - after)).sum(-1)
        losses = (-each.gather(1, wanted[:, None])[:, 0] for each in (first, after))
        parts.append(torch.stack([torch.ones_like(kl), *losses, kl, first.argmax(-1) == after.argmax(-1)], dim=1))
    rows = counts.nonzero(as_tuple=True)[0].cpu()
    summed = torch.zeros(len(targets), len(MEASURES), dtype=torch.float64)
    return summed.index_add_(0, rows, torch.cat(parts).double().cpu())


def _states(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], counts: torch.Tensor, head: OutputHead | None
) -> torch.Tensor:
    """Run the model; return the hidden states (N, D) before its head at the targets, or without a head the logits."""
    length, found = counts.shape[1], list[torch.Tensor]()
    if head is None:
        # virtual tokens stand before
        return model(**inputs, **no_cache(model, inputs)).logits[:, -length:][counts]

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        found.append(hidden[:, -length:][counts])
        return head.forward(hidden[:1, :0])  # the logits of no position

    with head.replaced(keep):
        model(**inputs, **no_cache(model, inputs))
    return found[0]
