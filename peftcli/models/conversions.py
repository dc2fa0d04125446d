"""Names that models had in older releases of transformers: of adapters that were trained with these, and of others.

Others are those that PEFT converts as it converts the old ones, and so does not load.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from transformers import conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from peftcli.core.config import AdapterConfig
from peftcli.core.layer import base_modules
from peftcli.core.targets import shortest_names
from peftcli.errors import PeftWarning

_PREFIX = "base_model.model."
_NAMES_OF_EXPERTS = {"down_proj", "gate_proj", "up_proj"}
"""Modules that PEFT takes for experts anywhere in a model of the kinds that it converts as Qwen2-MoE."""


def renaming_of_older(model: Any) -> Callable[[str], str]:
    """Return what gives a tensor of an adapter file the name that it has in ``model``, where its own is an older one.

    In older releases the language model of LLaVA, Gemma 3, Qwen2-VL and others was in another place. Names of modules
    that the model has stay.
    """
    if not hasattr(model, "base_model_prefix"):  # no model of transformers
        return lambda name: name
    renamings, modules = _renamings(model), base_modules(model)

    def known(path: str) -> int:
        parts = path.split(".")
        return next((end for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in modules), 0)

    def rename(name: str) -> str:
        path = name.removeprefix(_PREFIX)
        if path == name:
            return name
        new, _ = rename_source_key(path, renamings, [])
        return _PREFIX + new if known(new) > known(path) else name

    return rename


def _renamings(model: Any) -> list[WeightRenaming]:
    """Return what transformers does to the names of an older checkpoint of the model."""
    conversions = conversion_mapping.get_model_conversion_mapping(model)
    return [each for each in conversions if isinstance(each, WeightRenaming)]


def warn_of_peft(model: Any, config: AdapterConfig, tensors: Iterable[str]) -> None:
    """Warn of layers, by the names of the adapter file's ``tensors``, that PEFT looks for elsewhere: of LoRA alone."""
    if config.peft_type != "LORA" or not hasattr(model, "base_model_prefix"):  # no model of transformers
        return
    kind = model.config.model_type
    if conversion_mapping.get_checkpoint_conversion_mapping(kind) is None:
        return
    kinds = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    experts = _NAMES_OF_EXPERTS if kinds.get(kind) == "qwen2_moe" else set()
    renamings = _renamings(model)
    lost = dict[str, None]()
    for tensor in tensors:
        own = tensor.removeprefix(_PREFIX)
        name, is_lora, _ = own.partition(".lora_")
        renamed, _ = rename_source_key(own, renamings, [])
        if is_lora and (name.rpartition(".")[2] in experts or not tensor.endswith(renamed)):
            lost[name] = None
    if lost:
        text = (
            f"PEFT, which converts their names as those of older checkpoints, does not load {len(lost)} of the adapted "
            f"layers of {kind}, the first of them {next(iter(lost))}; to share the adapter with PEFT, add "
            f"exclude_modules: [{', '.join(shortest_names(model, list(lost)))}]"
        )
        warnings.warn(text, PeftWarning, stacklevel=2)
