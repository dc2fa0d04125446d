"""What an adapter folder holds, read from its config and the header of its weights, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftcli.adapters.load import find_adapter
from peftcli.errors import AdapterError
from peftcli.guard.adapter_folder import WEIGHTS_FILE, find_weights
from peftcli.guard.safetensors_header import TensorEntry
from peftcli.methods import METHODS
from peftcli.methods.updates import UpdateUnknown, find_updates

_LARGEST_ANALYSED = 1_000_000_000
"""Bytes of an adapter file that take some seconds."""
_DEAD = 1e-6
"""As a share of the largest update's norm: one below it does nothing."""


def describe(adapter: str) -> dict[str, Any]:
    """The facts about an adapter folder or hub id, as ``peftcli info ADAPTER`` prints them.

    Raises:
        AdapterError: no adapter there, or one that cannot be loaded, or its files are damaged.
    """
    source = find_adapter(adapter)
    config, shapes = source.values, source.header
    saved = config.get("modules_to_save")
    return {
        "adapter": adapter,
        "method": next(name for name, row in METHODS.items() if row.peft_type == source.config.peft_type),
        "peft_type": source.config.peft_type,
        "task_type": config.get("task_type"),
        "base_model": config.get("base_model_name_or_path"),
        **{
            name: config[name] for name in ("r", "lora_alpha", "num_virtual_tokens", "target_modules") if name in config
        },
        "modules_to_save": saved,
        "modules_adapted": len(_adapted(shapes, saved if isinstance(saved, list) else [])),
        "parameters": sum(entry.numel for entry in shapes.values()),
        "tensors": len(shapes),
        "dtypes": sorted({entry.dtype for entry in shapes.values()}),
        "bytes": max((entry.start + entry.size for entry in shapes.values()), default=0),
    }


def analyse(adapter: str) -> dict[str, Any]:
    """How much the adapter in a folder or hub id changes each weight, as far as its file tells.

    Returns:
        Of all updates the ``norm``; of each of the ``modules`` its name, r, Frobenius norm of its update, and how many
        directions that uses (``effective_r``); the names of those that are ``dead``: zero, or next to nothing beside
        the largest. Or the ``reason`` why nothing can be said.

    Raises:
        AdapterError: the adapter cannot be read, or its config and its tensors do not fit one another.
    """
    source = find_adapter(adapter)
    if find_weights(source.folder).stat().st_size > _LARGEST_ANALYSED:
        return {"reason": "the file is larger than 1 GB"}
    import math

    from peftcli.core.files import read_tensors
    from peftcli.methods.updates import effective_r

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


def _adapted(names: Mapping[str, TensorEntry], saved: list[str]) -> set[str]:
    """Paths of the modules that adapter layers stand over: a name is module path + weight name [+ .weight or .bias]."""
    found = set()
    for name in names:
        module, _, weight = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")
        trained_bias = name.endswith(".bias") and not weight.startswith("lora_")
        if module and not trained_bias and not {weight, *module.split(".")} & set(saved):
            found.add(module)
    return found
