"""An adapter as what it adds to the base model, from one whose start was taken out of the base model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from peftcli.adapters.load import find_adapter
from peftcli.core.config import AdapterConfig
from peftcli.core.files import read_tensors
from peftcli.core.protocols import describe
from peftcli.errors import AdapterError
from peftcli.methods.combinations import Adapter, Combination
from peftcli.methods.lora.combine import combine
from peftcli.methods.lora.config import LoraConfig
from peftcli.methods.lora.updates import pairs


def without_start(
    config: AdapterConfig, tensors: Mapping[str, torch.Tensor], start: str | Path
) -> tuple[AdapterConfig, Mapping[str, torch.Tensor]]:
    """Return a LoRA adapter without what it was at the start: one of twice the r.

    An adapter whose start was never taken out of the base model's weights is returned as it is: its file says the same.

    Args:
        config: the adapter's.
        tensors: the adapter's, by the names of the file.
        start: the folder that the adapter was saved in before it was trained.

    Raises:
        AdapterError: the adapter is of another method, or does not fit the one in the folder.
    """
    if not isinstance(config, LoraConfig):
        key = "path_initial_model_for_weight_conversion"
        raise AdapterError(f"works for LORA, not {config.peft_type}", key=key)
    if describe(config, tensors)["r"] != config.r:
        return config, tensors
    source = find_adapter(str(start))
    given = [
        Adapter(name, each, _factors(found))
        for name, each, found in (
            ("the adapter", config, tensors),
            (str(start), source.config, read_tensors(source.folder)),
        )
    ]
    combined = combine(given, [1, -1], Combination("cat"))
    return combined.config, {**tensors, **combined.tensors}


def _factors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {name for pair in pairs(tensors).values() for name in (pair.a, pair.b, pair.bias)}
    return {name: value for name, value in tensors.items() if name in names}
