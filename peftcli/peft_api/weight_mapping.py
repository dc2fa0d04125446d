"""What transformers' ``load_adapter`` asks of peft: how names in an adapter file become names in the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.core_model_loading import WeightRenaming

from peftcli.core.config import AdapterConfig

__all__ = ["build_peft_weight_mapping"]


def build_peft_weight_mapping(
    weight_conversions: Iterable[Any] | None, adapter_name: str, peft_config: AdapterConfig | None = None
) -> list[Any]:
    """Return what transformers does to the names of an adapter file, in this order.

    Of what it does to a checkpoint of the base model, renamings hold for adapters too. An adapter's name is no part of
    its tensors' names here.
    """
    prefix = "base_model.model." if peft_config is None else peft_config.file_prefix
    renamings = [each for each in weight_conversions or () if isinstance(each, WeightRenaming)]
    return [WeightRenaming(f"^{prefix}", ""), *renamings]
