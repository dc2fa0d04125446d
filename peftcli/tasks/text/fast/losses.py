"""The losses of ``token_loss.plain_losses`` with logits at targets only, a chunk of rows at a time.

The gradient is computed while a chunk's logits are there: of all that has a side of V, one chunk exists.

What a model does with its head's output (soft-capping, scaling, another bias) is not looked up in a list of models. It
is noted once, while the model reads a few tokens, and repeated. Where that does not give the model's own logits, there
is no such head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from peftcli.core.layer import base_module, model_ends
from peftcli.core.quantised import is_quantised
from peftcli.models.probe import probing
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.fast.segments import set_inside
from peftcli.tasks.text.token_ids import Losses, losses_of, no_cache

_FEW = 8
"""Tokens that the model reads while its head is looked for."""
_EXACT, _ROUNDED = 1e-3, 0.1
"""How far a logit may be off by rounding, in float32 and in less, relative to the logits' spread."""

_ROWS = {"cpu": 128}
"""Rows of logits in a chunk, by device; on others, whose memory is slower beside their arithmetic, ``_MORE_ROWS``."""
_MORE_ROWS = 1024

T = TypeVar("T")
Redo = Callable[[torch.Tensor], torch.Tensor]
RowLosses = Callable[[torch.Tensor, torch.Tensor], Losses]
Compute = Callable[[torch.Tensor, torch.Tensor, Redo], Losses]
"""Computes the losses of hidden states (N, D) and targets (N,) under a head, which makes logits (N, V) of them."""

_instead: ContextVar[Compute | None] = ContextVar("instead", default=None)


@dataclass(frozen=True)
class OutputHead:
    """What turns hidden states into logits."""

    module: nn.Module
    """The module that the model calls for it, maybe an adapter layer."""
    forward: Redo
    """Its own ``forward``."""
    redo: Redo
    """What the model does with the output of ``module``."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, V) of hidden states (N, D), each row by itself."""
        return self.redo(self.forward(hidden[None])).squeeze(0)  # an index's gradient would be a copy

    def at(self, temperature: float) -> OutputHead:
        """Return the head whose logits are divided by a temperature."""
        return self if temperature == 1 else replace(self, redo=lambda logits: self.redo(logits) / temperature)

    @contextmanager
    def replaced(self, forward: Redo) -> Iterator[None]:
        """Inside, the model calls ``forward`` with its hidden states (B, T, D) instead of its head."""
        own = vars(self.module)
        before = own.get("forward")
        own["forward"] = forward
        try:
            yield
        finally:
            del own["forward"]
            if before is not None:
                own["forward"] = before


_found: WeakKeyDictionary[nn.Module, Redo | None] = WeakKeyDictionary()
"""What was found for each model."""


def output_head(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> OutputHead | None:
    """Return the model's output head; None if logits are not what a module makes of each position's hidden state.

    ``inputs`` are arguments of the model, of which a few tokens are read the first time.
    """
    _, module = model_ends(model)
    if module is None or is_quantised(base_module(module)):
        return None
    if any(hasattr(weight, "ds_id") for weight in module.parameters()):  # DeepSpeed's, whole only in the module's call
        return None
    if model not in _found:
        few = {name: value[:1, :_FEW] if value.ndim == 2 else value[:1] for name, value in inputs.items()}
        with probing(model, next(iter(few.values())).device):
            _found[model] = _find_redo(model, module, few)
    redo = _found[model]
    return None if redo is None else OutputHead(module, module.forward, redo)


def take_head_as_it_is(model: nn.Module) -> None:
    """Take the output of the model's head for its logits, without looking: for a model whose weights have no values."""
    _found[model] = lambda logits: logits


def _find_redo(model: nn.Module, module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Redo | None:
    """Note what the model does with the output of its head ``module``; None if redoing it gives other logits."""
    seen: list[torch.Tensor] = []

    def note(_: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(args[0])
        noted = output.as_subclass(_Noted)
        noted.redo = lambda logits: logits
        return noted

    with module.register_forward_hook(note):
        noted = model(**inputs).logits
    if len(seen) != 1 or not isinstance(noted, _Noted) or noted.redo is None:
        return None
    hidden, logits = seen[0], noted.as_subclass(torch.Tensor).float()
    if hidden.ndim != 3 or logits.ndim != 3 or hidden.shape[1] < logits.shape[1]:
        return None
    # in another order: no position matters but its own
    try:
        again = OutputHead(module, module.forward, noted.redo).logits(hidden[0, -logits.shape[1] :].flip(0))
    except RuntimeError:  # it depends on their number, as where virtual tokens are cut off
        return None
    off = (again.flip(0) - logits[0]).abs().max() / logits.std()
    exact = noted.dtype == hidden.dtype == torch.float32 and not torch.is_autocast_enabled(hidden.device.type)
    return noted.redo if off <= (_EXACT if exact else _ROUNDED) else None


class _Noted(torch.Tensor):
    """Logits that note how they are made from the head's output."""

    redo: Redo | None = None
    """None: in a way that cannot be repeated."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ways = [each.redo if isinstance(each, cls) else partial(_constant, each) for each in args]
        result = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if isinstance(result, cls):
            known = [way for way in ways if way is not None]
            result.redo = partial(_again, func, known, kwargs or {}) if len(known) == len(ways) else None
        return result


def _constant(value: Any, _: torch.Tensor) -> Any:
    return value


def _again(func: Any, ways: list[Any], options: dict[str, Any], output: torch.Tensor) -> Any:
    """Call ``func`` once more, with what it was called with made of another output of the head."""
    return func(*(way(output) for way in ways), **options)


def losses_under(
    head: OutputHead, model: nn.Module, inputs: Mapping[str, torch.Tensor], targets: torch.Tensor
) -> Losses:
    """Return what ``plain_losses`` does, under a head of the model that ``output_head`` has found."""
    return states_under(head, model, inputs, targets, lambda states, each: chunked_losses(states, each, head.logits))


def states_under(
    head: OutputHead,
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    targets: torch.Tensor,
    compute: Callable[[torch.Tensor, torch.Tensor], T],
) -> T:
    """Run a model and return what ``compute`` makes of the states (N, D) at the targets that count, and of these (N,).

    It is called inside the model, in the place of its ``head``.
    """
    found = list[T]()
    counts = (targets != IGNORED).nonzero(as_tuple=True)  # before the model runs, since a GPU is waited for

    def instead(hidden: torch.Tensor) -> torch.Tensor:
        found.append(compute(hidden[:, -targets.shape[1] :][counts], targets[counts]))
        return head.forward(hidden[:1, :0])  # the logits of no position

    with head.replaced(instead):
        model(**inputs, **no_cache(model, inputs))
    return found[-1]  # an adapter may have the whole model read the tokens once before


def chunked_losses(hidden: torch.Tensor, targets: torch.Tensor, head: Redo) -> Losses:
    """Return the losses of hidden states (N, D) and targets (N,); ``head`` makes logits (N, V) of the former."""
    if is_trained(head, hidden):
        return row_losses(hidden, targets, lambda part, wanted: losses_of(head(part), wanted), head_trains=True)
    return (_instead.get() or frozen_losses)(hidden, targets, head)


def is_trained(head: Redo, hidden: torch.Tensor) -> bool:
    """Return whether a head of hidden states (N, D) itself trains."""
    return head(hidden[:0].detach()).requires_grad


def frozen_losses(hidden: torch.Tensor, targets: torch.Tensor, head: Redo) -> Losses:
    """Return what ``chunked_losses`` does, under a head that does not train."""
    return _by_chunks(hidden, targets, partial(_chunk, head))


def row_losses(hidden: torch.Tensor, beside: torch.Tensor, compute: RowLosses, *, head_trains: bool) -> Losses:
    """Return the losses of hidden states (N, D), and what is computed with them, a chunk of rows at a time.

    ``compute`` takes a chunk (n, D), and the same rows of ``beside`` (N, ...), and returns losses (n,) with gradients
    and (n, ...) without. A row's must depend on this row alone. ``head_trains``: it has parameters that train, so that
    a chunk is computed again in the backward pass.
    """
    if not head_trains:
        return _by_chunks(hidden, beside, partial(_chunk_of, compute))
    size = _ROWS.get(hidden.device.type, _MORE_ROWS)
    parts = zip(hidden.split(size), beside.split(size), strict=True)
    found = [checkpoint(compute, *part, use_reentrant=False) for part in parts]
    return torch.cat([losses for losses, _ in found]), torch.cat([more for _, more in found])


def _by_chunks(hidden: torch.Tensor, beside: torch.Tensor, chunk: Any) -> Losses:
    return _Losses.apply(hidden, beside, chunk, _ROWS.get(hidden.device.type, _MORE_ROWS))  # type: ignore[no-untyped-call]


def frozen_losses_by(compute: Compute) -> AbstractContextManager[None]:
    """Inside, ``compute`` stands for ``frozen_losses``, while several models compute as one; see ``joined``."""
    return set_inside(_instead, compute)


class _Losses(torch.autograd.Function):
    """The losses under a frozen head. A row's loss depends on this row alone, so its gradient is known with it."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, beside: torch.Tensor, chunk: Any, size: int) -> Losses:
        trains = ctx.needs_input_grad[0]
        parts = zip(hidden.detach().split(size), beside.split(size), strict=True)
        losses, more, gradients = zip(*(chunk(*part, trains) for part in parts), strict=True)
        if trains:
            ctx.save_for_backward(torch.cat(gradients))
        found = torch.cat(losses), torch.cat(more)
        ctx.mark_non_differentiable(found[1])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        return (gradients * weights[:, None]).to(gradients.dtype), None, None, None


def _chunk_of(
    compute: RowLosses, hidden: torch.Tensor, beside: torch.Tensor, trains: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return what ``compute`` gives of a chunk, and the gradient (n, D) of the losses."""
    with torch.set_grad_enabled(trains):
        losses, more = compute(hidden.requires_grad_(trains), beside)
        gradient = torch.autograd.grad(losses.sum(), hidden)[0] if trains else None
    return losses.detach(), more, gradient


def _chunk(
    head: Redo, hidden: torch.Tensor, targets: torch.Tensor, trains: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the losses of a chunk, whether each target was the first choice, and the gradient (n, D) of the losses."""
    with torch.set_grad_enabled(trains):
        logits = head(hidden.requires_grad_(trains))
    values, place = logits.detach(), targets[:, None]
    highest, chosen = values.amax(-1, keepdim=True), values.gather(1, place)
    shares = values.float().sub_(highest) if values.dtype != torch.float32 else values - highest
    total = shares.exp_().sum(-1, keepdim=True)  # shares of it
    losses = (total.log() + (highest.float() - chosen.float()))[:, 0]
    if not trains:
        return losses, values.argmax(-1) == targets, None
    shares.scatter_add_(1, place, -total)
    (gradient,) = torch.autograd.grad(logits, hidden, shares.to(logits.dtype))
    # nobody reads in training which was the first choice alone, and to look for it takes longer
    return losses, (chosen == highest)[:, 0], (gradient / total).to(gradient.dtype)
