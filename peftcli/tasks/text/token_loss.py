"""The cross-entropy over target tokens, which the language-model tasks share.

Logits are computed at targets only, a chunk of rows at a time, and the gradient while they are there: of all that has a
side of V, one chunk exists. ``plain_losses`` computes the same in one piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from peftcli.core.prompts.inputs import takes
from peftcli.tasks.base import Loss
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.output_head import output_head
from peftcli.tasks.text.unpadded import is_unpadded, only, set_inside

_ROWS = {"cpu": 128}
"""Rows of logits in a chunk, by device; on others, whose memory is slower beside their arithmetic, ``_MORE_ROWS``."""
_MORE_ROWS = 1024

Losses = tuple[torch.Tensor, torch.Tensor]
"""The cross-entropy of each target, in float32 with gradients, and whether it was the model's first choice (in
training also whether it was one of several): (N,) each."""
Compute = Callable[[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]], Losses]
"""Computes the losses of hidden states (N, D) and targets (N,) under a head, which makes logits (N, V) of them."""

_instead: ContextVar[Compute | None] = ContextVar("instead", default=None)


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Return the targets (B, T) of a causal model, which predicts the next token at each position."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def target_losses(model: nn.Module, inputs: Mapping[str, torch.Tensor], targets: torch.Tensor) -> Losses:
    """Run a language model; return the losses of the targets that count, row after row.

    ``model`` may be below a wrapper of accelerate's, and may have a soft prompt; ``targets`` (B, T) are those of its
    last T positions.
    """
    head = output_head(inner_model(model), inputs)
    if head is None:
        return plain_losses(model, inputs, targets)
    found = list[Losses]()
    counts = (targets != IGNORED).nonzero(as_tuple=True)  # before the model runs, since a GPU is waited for

    def instead(hidden: torch.Tensor) -> torch.Tensor:
        chosen = hidden[:, -targets.shape[1] :][counts]
        found.append(chunked_losses(chosen, targets[counts], head.logits))
        return head.forward(hidden[:1, :0])  # the logits of no position

    with head.replaced(instead):
        model(**inputs, **no_cache(model, inputs))
    return found[0]


def plain_losses(model: nn.Module, inputs: Mapping[str, torch.Tensor], targets: torch.Tensor) -> Losses:
    """Return what ``target_losses`` does, from the model's own logits, of more than the targets where it must."""
    given, counts = dict[str, Any](inputs), targets != IGNORED
    if is_unpadded(inner_model(model)):
        with only(counts):
            return losses_of(model(**given, **no_cache(model, inputs)).logits[0], targets[counts])
    kept = counts.any(dim=0).nonzero().squeeze(1)
    if takes(inner_model(model), "logits_to_keep"):
        # counted from the end, since a soft prompt lengthens the front
        given["logits_to_keep"] = kept - targets.shape[1]
    logits = model(**given, **no_cache(model, inputs)).logits
    if "logits_to_keep" not in given:
        logits = logits[:, -targets.shape[1] :][:, kept]
    return losses_of(logits[counts[:, kept]], targets[counts])


def inner_model(model: nn.Module) -> Any:
    """The model below any wrapper of accelerate's."""
    return getattr(model, "module", model)


def no_cache(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, bool]:
    """Return arguments that turn the cache off, with which packed examples would not be looked for.

    Some models know none.
    """
    return {"use_cache": False} if takes(inner_model(model), "use_cache") or "position_ids" in inputs else {}


def losses_of(logits: torch.Tensor, targets: torch.Tensor) -> Losses:
    """Return the losses of logits (N, V) and targets (N,)."""
    logits = logits.float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1) == targets


def chunked_losses(hidden: torch.Tensor, targets: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor]) -> Losses:
    """Return the losses of hidden states (N, D) and targets (N,); ``head`` makes logits (N, V) of the former."""
    if not head(hidden[:0].detach()).requires_grad:
        return (_instead.get() or frozen_losses)(hidden, targets, head)
    size = _ROWS.get(hidden.device.type, _MORE_ROWS)
    # the head itself trains: its logits are computed again in the backward pass, by whatever it is made of

    def losses(part: torch.Tensor, wanted: torch.Tensor) -> Losses:
        return losses_of(head(part), wanted)

    parts = zip(hidden.split(size), targets.split(size), strict=True)
    found = [checkpoint(losses, *part, use_reentrant=False) for part in parts]
    return torch.cat([loss for loss, _ in found]), torch.cat([correct for _, correct in found])


def frozen_losses(hidden: torch.Tensor, targets: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor]) -> Losses:
    """Return what ``chunked_losses`` does, under a head that does not train."""
    size = _ROWS.get(hidden.device.type, _MORE_ROWS)
    return _Losses.apply(hidden, targets, head, size)  # type: ignore[no-untyped-call]


def frozen_losses_by(compute: Compute) -> AbstractContextManager[None]:
    """Inside, ``compute`` stands for ``frozen_losses``, while several models compute as one; see ``joined``."""
    return set_inside(_instead, compute)


class _Losses(torch.autograd.Function):
    """The losses under a frozen head. A row's loss depends on this row alone, so its gradient is known with it."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Any, size: int) -> Losses:
        trains = ctx.needs_input_grad[0]
        parts = zip(hidden.detach().split(size), targets.split(size), strict=True)
        losses, correct, gradients = zip(*(_chunk(head, *part, trains) for part in parts), strict=True)
        if trains:
            ctx.save_for_backward(torch.cat(gradients))
        found = torch.cat(losses), torch.cat(correct)
        ctx.mark_non_differentiable(found[1])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        return (gradients * weights[:, None]).to(gradients.dtype), None, None, None


def _chunk(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, targets: torch.Tensor, trains: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the losses of a chunk, whether each target was the first choice, and the gradient (n, D) of the losses."""
    with torch.set_grad_enabled(trains):
        logits = head(hidden.requires_grad_(trains))
    values, place = logits.detach(), targets[:, None]
    # on a CPU a softmax that converts takes five times as long as the two one after the other
    shares = values.softmax(-1, dtype=torch.float32) if values.is_cuda else values.float().softmax(-1)
    highest, total = values.amax(-1), shares.sum(-1)  # torch's shares of 50,000 tokens add up to 1 within 2e-5 only
    chosen = values.gather(1, place)[:, 0]
    # the logarithm of the sum of exponentials is the highest logit less the logarithm of its share
    losses = highest.float() - (shares.amax(-1) / total).log() - chosen.float()
    if not trains:
        return losses, values.argmax(-1) == targets, None
    shares.scatter_add_(1, place, -total[:, None])
    (gradient,) = torch.autograd.grad(logits, hidden, shares.to(logits.dtype))
    # nobody reads in training which was the first choice alone, and to look for it takes longer
    return losses, chosen == highest, (gradient / total[:, None]).to(gradient.dtype)


def token_loss(losses: Losses) -> Loss:
    """Sum the losses of target tokens."""
    total = losses[0].sum()
    return Loss(total, {"loss": total.detach(), "correct": losses[1].sum()})


def token_metrics(sums: Mapping[str, np.ndarray], num_targets: int) -> dict[str, float]:
    """Loss per target (natural logarithm), its exponential, and the share of targets that were the top choice."""
    loss, accuracy = (float(sums[name]) / num_targets for name in ("loss", "correct"))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": accuracy}
