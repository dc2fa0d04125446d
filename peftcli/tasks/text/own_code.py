"""Functions of the user's own Python files, which a recipe names and has to allow."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftcli.errors import DataError


def own_function(name: str, key: str, *, allowed: bool, switch: str) -> Callable[..., Any]:
    """Load a function of the user's own file, named as ``metrics.py:score``.

    Args:
        name: File and function.
        key: The setting that names it, for errors.
        allowed: Whether the setting ``switch`` allows the code to run.
        switch: The name of that setting.

    Raises:
        DataError: the code is not allowed or fails, or there is no such function.
    """
    if not allowed:
        raise DataError(
            "runs code of yours, which has to be allowed", key=key, hint=f"read that file, and set {switch}: true"
        )
    path, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location("peftcli_own_code", path) if path.endswith(".py") else None
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise DataError(f"expected a file and its function, as metrics.py:score, found {name[:200]!r}", key=key)
    module = importlib.util.module_from_spec(spec)
    with as_data_error(key):
        sys.modules[spec.name] = module  # where dataclasses look up the names of types
        spec.loader.exec_module(module)
    own: Callable[..., Any] | None = getattr(module, function, None)
    if not callable(own):
        raise DataError(f"{path} has no function {function!r}", key=key)
    return own


@contextmanager
def as_data_error(key: str) -> Iterator[None]:
    """Inside runs the user's code: whatever it raises is a DataError about the setting ``key``."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{type(error).__name__}: {error}", key=key) from error
