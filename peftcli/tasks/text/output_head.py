"""The output head of a language model apart from the model: logits of chosen positions only, a chunk at a time.

What a model does with its head's output (soft-capping, scaling, another bias) is not looked up in a list of models. It
is noted once, while the model reads a few tokens, and repeated. Where that does not give the model's own logits, there
is no such head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from peftcli.core.layer import base_module, model_ends
from peftcli.core.quantised import is_quantised
from peftcli.models.probe import probing

_FEW = 8
"""Tokens that the model reads while its head is looked for."""
_EXACT, _ROUNDED = 1e-3, 0.1
"""How far a logit may be off by rounding, in float32 and in less, relative to the logits' spread."""

Redo = Callable[[torch.Tensor], torch.Tensor]


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
        return self.redo(self.forward(hidden[None]))[0]

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
    again = OutputHead(module, module.forward, noted.redo).logits(hidden[0, -logits.shape[1] :].flip(0))
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
