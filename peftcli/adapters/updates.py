"""How much an adapter changes each weight of its base model, from its file alone."""

from __future__ import annotations

import math
from typing import Any

from peftcli.adapters.load import find_adapter
from peftcli.core.files import read_tensors
from peftcli.errors import AdapterError
from peftcli.guard.adapter_folder import WEIGHTS_FILE, find_weights
from peftcli.methods.updates import UpdateUnknown, effective_r, find_updates

_MAX_ANALYSED = 1_000_000_000
"""Bytes of an adapter file; these take some seconds."""
_DEAD = 1e-6
"""Share of the largest update's norm. Updates below it have no effect."""


def analyse(adapter: str) -> dict[str, Any]:
    """Measure how much an adapter, in a folder or on the hub, changes each weight.

    Returns:
        The ``norm`` of all updates; for each of the ``modules`` its name, its r, the Frobenius norm of its update and
        the number of directions that the update uses (``effective_r``); the names of those that are ``dead``: zero, or
        negligible beside the largest. Or the ``reason`` why the updates are unknown.

    Raises:
        AdapterError: the adapter cannot be read, or its config and its tensors do not fit one another.
    """
    source = find_adapter(adapter)
    if find_weights(source.folder).stat().st_size > _MAX_ANALYSED:
        return {"reason": "the file is larger than 1 GB"}
    tensors = read_tensors(source.folder)
    try:
        updates = find_updates(source.config, tensors)
    except UpdateUnknown as error:
        return {"reason": error.message}
    except AdapterError as error:
        raise AdapterError(error.message, key=error.key, file=str(source.folder / WEIGHTS_FILE)) from None
    modules: list[dict[str, Any]] = []
    for path, update in updates.items():
        values = update.singular_values()
        norm = math.hypot(*values.tolist())  # whose squares may be too large, or too small
        if norm == math.inf:
            return {"reason": f"that of {path[:200]} is too large for numbers of 64 bits"}
        modules.append({"module": path, "r": update.r, "norm": norm, "effective_r": effective_r(values)})
    largest = max((module["norm"] for module in modules), default=0.0)
    norm = math.hypot(*(module["norm"] for module in modules))
    if norm == math.inf:
        return {"reason": "together they are too large for numbers of 64 bits"}
    return {
        "norm": norm,
        "dead": [module["module"] for module in modules if module["norm"] <= _DEAD * largest],
        "modules": modules,
    }
