"""The number formats that a model with an adapter computes in: those of the evaluations of training, if they are known.

run.json says them; of an adapter without one, task.json.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftcli.adapters.load import AdapterSource
from peftcli.guard.typed_fields import mapping_at

_NAMED = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class NumberFormat:
    """The number formats of a forward pass."""

    weights: torch.dtype
    """Of the base model's weights."""
    bf16: bool
    """Whether it computes in bfloat16, whatever the weights are."""

    def autocast(self, model: Any) -> AbstractContextManager[Any]:
        """Inside, a model computes in this format."""
        return torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16)


def has_bf16() -> bool:
    """Return whether the device has arithmetic for bfloat16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = Path("/proc/cpuinfo")
    text = flags.read_text() if flags.exists() else ""
    return " avx512_bf16" in text or " amx_bf16" in text


def trained_bf16(source: AdapterSource) -> bool | None:
    """Return whether evaluations of training computed in bfloat16; None where that is not known.

    Where nobody asked for it, it is False on a device without arithmetic for it, which would be slow.
    """
    used, asked, _ = _recorded(source)
    return used if not used or asked is True else has_bf16()


def device_format(dtype: str | None = None) -> NumberFormat:
    """Return the format ``dtype``, else what suits the device."""
    if dtype is not None:
        return NumberFormat(getattr(torch, dtype), dtype == "bfloat16")
    halves = torch.cuda.is_available() and has_bf16()
    return NumberFormat(torch.bfloat16 if halves else torch.float32, bf16=False)


def number_format(source: AdapterSource, dtype: str | None = None) -> NumberFormat:
    """Return the format to answer in: ``dtype``, else that of training, else what suits the device."""
    bf16 = trained_bf16(source)
    if dtype is not None or bf16 is None:
        return device_format(dtype)
    named = _recorded(source)[2]
    if named not in _NAMED:
        named = "bfloat16" if bf16 else "float32"
    return NumberFormat(getattr(torch, named), bf16)


def _recorded(source: AdapterSource) -> tuple[bool | None, Any, Any]:
    """Whether evaluations computed in bfloat16, and the recipe's ``training.bf16`` and ``base_model.dtype``."""
    if "bf16" in source.record:
        used, recipe = source.record["bf16"], mapping_at(source.record, "recipe")
        asked, dtype = mapping_at(recipe, "training").get("bf16"), mapping_at(recipe, "base_model").get("dtype")
    else:
        found = mapping_at(source.task_values, "number_format")
        used, asked, dtype = found.get("bf16"), None, found.get("dtype")
    return used if isinstance(used, bool) else None, asked, dtype
