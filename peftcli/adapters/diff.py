"""How much an adapter changes each weight, and what differs between two adapters, from their files alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, TypeVar

import torch

from peftcli.adapters.load import find_adapter
from peftcli.core.config import AdapterConfig
from peftcli.core.files import read_tensors
from peftcli.errors import AdapterError
from peftcli.guard.adapter_folder import WEIGHTS_FILE, find_weights
from peftcli.methods.updates import Update, UpdateUnknown, distance, effective_r, find_updates

_T = TypeVar("_T")
_IGNORED = ("auto_mapping", "inference_mode", "peft_version", "runtime_config")
"""Fields of a config that say nothing of the adapter."""


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


def compare(a: str, b: str) -> dict[str, Any]:
    """The differences of two adapters, each a folder or a hub id.

    Updates of weights are compared as what they add, whatever the r and the method. Tensors that are no part of an
    update, and all those of methods whose files do not tell their updates, are compared value by value.

    Returns:
        ``equal``; ``config``: the settings that differ, each ``{"key", "a", "b"}``; ``reason``: why updates cannot be
        compared, or None; ``modules`` and ``tensors``: of each in both, name, ``difference`` (the norm of the
        difference, as a share of the larger one's norm) and ``cosine``; ``only_a`` and ``only_b``: names of updates and
        tensors in one only, or of another size in the other; ``difference`` and ``cosine`` of all together, to which
        an update in one only counts too.

    Raises:
        AdapterError: an adapter cannot be read, or its tensors do not fit its config.
    """
    adapters = [(source.config, read_tensors(source.folder)) for source in map(find_adapter, (a, b))]
    reason = None
    updates: list[dict[str, Update]] = [{}, {}]
    try:
        updates = [find_updates(config, tensors) for config, tensors in adapters]
    except UpdateUnknown as error:
        reason = error.message
    rest = [_without(*adapter, changed) for adapter, changed in zip(adapters, updates, strict=True)]
    modules = {name: _of_updates(*pair) for name, pair in _in_both(updates, lambda update: update.shape).items()}
    tensors = {name: _of_tensors(*pair) for name, pair in _in_both(rest, torch.Tensor.size).items()}
    names = [{*changed, *others} - {*modules, *tensors} for changed, others in zip(updates, rest, strict=True)]
    only_a, only_b = sorted(names[0]), sorted(names[1])
    config = _differences(*(config for config, _ in adapters))
    parts = [*modules.values(), *tensors.values()]
    norms = [[own[name].norm() for name in own.keys() - modules.keys()] for own in updates]
    alone = [_Difference(norm, 0.0, 0.0, norm) for norm in norms[0]]
    alone += [_Difference(0.0, norm, 0.0, norm) for norm in norms[1]]
    return {
        "a": a,
        "b": b,
        "equal": not config and not only_a and not only_b and all(part.distance == 0 for part in parts),
        "config": config,
        "reason": reason,
        "only_a": only_a,
        "only_b": only_b,
        "modules": [{"module": name, **part.described()} for name, part in modules.items()],
        "tensors": [{"tensor": name, **part.described()} for name, part in tensors.items()],
        **_together([*parts, *alone]).described(),
    }


@dataclass(frozen=True)
class _Difference:
    """Of two vectors: the norms, the inner product, and the norm of the difference."""

    norm_a: float
    norm_b: float
    dot: float
    distance: float

    def described(self) -> dict[str, float | None]:
        larger, product = max(self.norm_a, self.norm_b), self.norm_a * self.norm_b
        if not math.isfinite(product) or not math.isfinite(self.dot):
            return {"difference": None, "cosine": None}
        return {
            "difference": self.distance / larger if larger else 0.0,
            "cosine": max(-1.0, min(1.0, self.dot / product)) if product else None,
        }


def _without(
    config: AdapterConfig, tensors: Mapping[str, torch.Tensor], updates: Mapping[str, Update]
) -> dict[str, torch.Tensor]:
    """Return the tensors that are no part of ``updates``, by names that begin as those of updates do."""
    parts = {name for update in updates.values() for name in update.tensors}
    return {name.removeprefix(config.file_prefix): value for name, value in tensors.items() if name not in parts}


def _in_both(two: Sequence[Mapping[str, _T]], size: Callable[[_T], Any]) -> dict[str, tuple[_T, _T]]:
    """Return what has the same name and size in both."""
    a, b = two
    return {name: (a[name], b[name]) for name in a if name in b and size(a[name]) == size(b[name])}


def _differences(one: AdapterConfig, other: AdapterConfig) -> list[dict[str, Any]]:
    described = [
        {entry.name: _shown(getattr(config, entry.name)) for entry in fields(config)} for config in (one, other)
    ]
    keys = [key for key in {**described[0], **described[1]} if key not in _IGNORED]
    values = {key: tuple(values.get(key) for values in described) for key in keys}
    return [{"key": key, "a": a, "b": b} for key, (a, b) in values.items() if a != b]


def _shown(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return sorted(value) if isinstance(value, set) else value


def _of_updates(a: Update, b: Update) -> _Difference:
    same = a.scaling == b.scaling and torch.equal(a.left, b.left) and torch.equal(a.right, b.right)
    return _Difference(a.norm(), b.norm(), a.dot(b), 0.0 if same else distance(a, b))


def _of_tensors(a: torch.Tensor, b: torch.Tensor) -> _Difference:
    one, other = a.double(), b.double()
    return _Difference(float(one.norm()), float(other.norm()), float((one * other).sum()), float((one - other).norm()))


def _together(parts: list[_Difference]) -> _Difference:
    return _Difference(
        math.hypot(*(part.norm_a for part in parts)),
        math.hypot(*(part.norm_b for part in parts)),
        sum(part.dot for part in parts),
        math.hypot(*(part.distance for part in parts)),
    )
