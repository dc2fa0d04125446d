"""Sketches of tensors as JSON: enough of one to compare another with it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, TypedDict

import torch

_SAMPLED = 256
"""Values of a tensor that are kept."""
_PART = 1_000_000
"""Values that are converted at once."""


class Numbers(TypedDict):
    """The sketch of a tensor of floating-point numbers."""

    shape: list[int]
    values: list[float]
    mean: float
    deviation: float


class Whole(TypedDict):
    """The sketch of a tensor of whole numbers, or of one without values."""

    shape: list[int]
    sha256: str


Sketch = Numbers | Whole


def hash_of(value: torch.Tensor) -> str:
    """A hash of a tensor's type, shape and bytes."""
    flat = value.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{flat.dtype} {tuple(flat.shape)} ".encode())
    digest.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sketch(value: torch.Tensor) -> dict[str, Any]:
    """A tensor's shape, some of its values, their mean and deviation; of whole numbers a hash."""
    shape = list(value.shape)
    if not value.is_floating_point() or not value.numel():
        return {"shape": shape, "sha256": hash_of(value)}
    flat = value.detach().cpu().flatten()
    last = len(flat) - 1
    at = torch.linspace(0, last, min(len(flat), _SAMPLED)).long().clamp(max=last)  # of large ones it rounds up
    mean = sum(float(_finite(part).sum()) for part in flat.split(_PART)) / len(flat)
    variance = sum(float((_finite(part) - mean).square().sum()) for part in flat.split(_PART)) / len(flat)
    return {"shape": shape, "values": _finite(flat[at]).tolist(), "mean": mean, "deviation": math.sqrt(variance)}


def _finite(values: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(values.double(), posinf=0.0, neginf=0.0)


def difference(now: Mapping[str, Any], then: Mapping[str, Any]) -> float:
    """The largest difference of two sketches, as a share of the values' deviation; infinite for other shapes."""
    if now["shape"] != then["shape"] or now.get("sha256") != then.get("sha256"):
        return math.inf
    if len(now.get("values", ())) != len(then.get("values", ())):  # of a damaged sketch
        return math.inf
    if "values" not in then:
        return 0.0
    numbers = ((*each["values"], each["mean"], each["deviation"]) for each in (now, then))
    return max(abs(one - other) for one, other in zip(*numbers, strict=True)) / (then["deviation"] or 1.0)
