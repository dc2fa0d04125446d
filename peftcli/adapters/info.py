"""Facts about an adapter, from its config and the header of its weights, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from peftcli.adapters.load import AdapterSource, find_adapter
from peftcli.core.config import AdapterConfig
from peftcli.errors import AdapterError
from peftcli.guard.safetensors_header import TensorEntry
from peftcli.guard.typed_fields import mapping_at
from peftcli.methods import METHODS
from peftcli.methods.lora import LoraConfig

_BOTH = (
    *("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication"),
    *("kasa_config", "alpha_pattern"),
)
_UNREAD = {
    "vllm": (*_BOTH, "rank_pattern", "alora_invocation_tokens"),
    "llama.cpp": (*_BOTH, "use_rslora"),
}
"""Servers -> settings of LoRA that they refuse or pass over, by their code."""
_PAIR = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
_TENSORS = {"vllm": _PAIR, "llama.cpp": (*_PAIR, "base_layer.weight")}
"""Servers -> endings of the names of tensors that they read, or pass over rightly. At any other name they stop."""


def describe(adapter: str) -> dict[str, Any]:
    """Return the facts about an adapter folder or hub id that ``peftcli info ADAPTER`` prints.

    Raises:
        AdapterError: there is no adapter, it is not supported, or its files are damaged.
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
        "parameters": _parameters(source),
        "tensors": len(shapes),
        "dtypes": sorted({entry.dtype for entry in shapes.values()}),
        "bytes": max((entry.start + entry.size for entry in shapes.values()), default=0),
        "servers": _servers(source.config, shapes),
    }


def _parameters(source: AdapterSource) -> int:
    """Count the parameters that were trained, by run.json: shared ones once, no buffers; else those that are saved."""
    with suppress(AdapterError):  # run.json is damaged
        trained = mapping_at(source.record, "parameters").get("trainable")
        if type(trained) is int and trained >= 0:
            return trained
    return sum(entry.numel for entry in source.header.values())


def _servers(config: AdapterConfig, tensors: Iterable[str]) -> list[str]:
    """Return what servers are known not to read of a language model's adapter, unless it is merged."""
    if config.task_type != "CAUSAL_LM":
        return []
    if not isinstance(config, LoraConfig):
        return [f"{server} reads no {config.peft_type}" for server in _UNREAD]
    unread = {server: [name for name in names if getattr(config, name)] for server, names in _UNREAD.items()}
    for server, names in unread.items():
        other = [".".join(name.split(".")[-3:]) for name in tensors if not name.endswith(_TENSORS[server])]
        unread[server] = names or other[:1]
    return [f"{server} reads no {' or '.join(names)}" for server, names in unread.items() if names]


def _adapted(names: Mapping[str, TensorEntry], saved: list[str]) -> set[str]:
    """Return the paths of the adapted modules. A tensor is named module path + weight name [+ .weight or .bias]."""
    found = set()
    for name in names:
        module, _, weight = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")
        trained_bias = name.endswith(".bias") and not weight.startswith("lora_")
        is_saved = any(f".{saved_name}." in f".{module}.{weight}." for saved_name in saved)
        if "." in module and not trained_bias and not is_saved:  # what all modules share stands in none
            found.add(module)
    return found
