"""When Python looks for garbage: not while a command imports torch and transformers, whose objects all stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_postponed = False


@contextmanager
def postponed_collection() -> Iterator[None]:
    """Inside, no garbage is collected before ``collect_from_here``, which every command calls that works long."""
    global _postponed
    _postponed = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        collect_from_here()
        gc.unfreeze()


def collect_from_here() -> None:
    """Collect garbage again where that was postponed, and never look at what is there already."""
    global _postponed
    if _postponed:
        _postponed = False
        gc.freeze()
        gc.enable()
