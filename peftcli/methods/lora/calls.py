"""Functions around every call of a model, for as long as its adapters are there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from peftcli.core.inject import on_unload


def watch_calls(model: nn.Module, before: Callable[..., Any], after: Callable[..., Any] | None = None) -> None:
    """Call functions of a module around every call of the model, as PyTorch's hooks, until its adapters are unloaded.

    They get the keywords too. Each is registered once.
    """
    if before not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(before, with_kwargs=True)
        if after is not None:
            model.register_forward_hook(after, with_kwargs=True)
        on_unload(model, functools.partial(_stop_watching, model, before, after))


def _stop_watching(model: nn.Module, *functions: Callable[..., Any] | None) -> None:
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for number in [number for number, hook in hooks.items() if hook in functions]:
            del hooks[number]
