"""Facts about an adapter, from its config and the header of its weights, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from peftcli.adapters.export.programs import PROGRAMS, readings, traits
from peftcli.adapters.load import AdapterSource, find_adapter
from peftcli.core.config import AdapterConfig
from peftcli.errors import AdapterError, UsageError
from peftcli.guard.safetensors_header import TensorEntry
from peftcli.guard.typed_fields import mapping_at
from peftcli.methods import METHODS
from peftcli.methods.lora import LoraConfig

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


def describe_readers(adapter: str) -> list[dict[str, Any]]:
    """Return what each program does with an adapter folder or hub id: see ``programs.readings``.

    Raises:
        AdapterError: there is no adapter, it is not supported, or its files are damaged.
        UsageError: it is no adapter of a language model.
    """
    source = find_adapter(adapter)
    if source.config.task_type != "CAUSAL_LM":
        kind = source.task or source.config.task_type or "no task that is known"
        hint = f"peftcli verify {adapter} --with READER asks a library that loads it"
        message = f"is an adapter of {kind}; these programs serve language models"
        raise UsageError(message, file=adapter, key="--readers", hint=hint)
    form = source.recorded_form
    return readings(adapter, source.config, source.header, chat=form is not None and form.chat)


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
        return [f"{server} reads no {config.peft_type}" for server in _TENSORS]
    own, unread = traits(config, ()), {}
    for server, read in _TENSORS.items():
        program = PROGRAMS[server]
        names = [name for name in own if name in program.refuses or name in program.misreads]
        other = [".".join(name.split(".")[-3:]) for name in tensors if not name.endswith(read)]
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
