"""A model, or a LoRA, as a .gguf file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open

from peftcli.adapters.export.lora import PlainLora
from peftcli.errors import ModelError, UsageError
from peftcli.models.gguf_families import (
    GgufFamily,
    as_stored,
    gguf_family,
    gguf_name,
    more_tensors,
    name_map,
    row_order,
    write_settings,
)
from peftcli.models.open import OpenBase
from peftcli.system.outputs import storage_errors
from peftcli.system.packages import installed_version
from peftcli.tasks.text.gguf_vocabulary import write_vocabulary

Numbers = Literal["f32", "f16", "q8_0", "q4_0"]
_FILE_TYPES: dict[str, str] = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
_BLOCK = 32
"""Values of a row that are quantised together."""
_EXACT = ("position_embd.weight", "rope_freqs.weight")
"""Tensors that llama.cpp wants in float32."""
_ENDS = ("token_embd.weight", "output.weight")
"""Kept in 8 bits where others have 4: they are read, or decide, at every token."""


def require_gguf() -> Any:
    """Return the package gguf.

    Raises:
        UsageError: it is not installed.
    """
    if installed_version("gguf") is None:
        raise UsageError("needs the package gguf", key="--form", hint="pip install 'peftcli[gguf]'")
    import gguf

    return gguf


def write_adapter_file(lora: PlainLora, opened: OpenBase, path: Path) -> None:
    """Write a LoRA as a .gguf file, which is used with the base model in another.

    Raises:
        ModelError: llama.cpp has no place for one of its modules.
    """
    gguf, config = require_gguf(), opened.config.get_text_config()
    family = gguf_family(config.model_type)
    names = name_map(family, config.num_hidden_layers)
    with storage_errors(path):
        writer = gguf.GGUFWriter(path, family.architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(lora.r))
        for module, update in lora.updates.items():
            name = gguf_name(names, f"{module}.weight")
            order = row_order(family, config, f"{module}.weight")
            left = update.left if order is None else update.left[order]
            writer.add_tensor(f"{name}.lora_a", update.right.contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", left.contiguous().numpy())
        _finish(writer, lambda: writer.write_tensors_to_file())


def write_model_file(opened: OpenBase, path: Path, numbers: Numbers, *, chat: bool) -> None:
    """Write a model in safetensors as a .gguf file, a tensor at a time.

    ``chat`` says whether its answers end as the chat template ends them.

    Raises:
        ModelError: peftcli or llama.cpp does not know such a model, or a value is too large for 16 bits.
    """
    gguf, config = require_gguf(), opened.config.get_text_config()
    family = gguf_family(config.model_type)
    if not opened.shards:
        raise ModelError(f"{opened.name} has no safetensors files, of which a .gguf file is made", key="base_model")
    with storage_errors(path):
        writer = gguf.GGUFWriter(path, family.architecture)
        writer.add_type("model")
        writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[numbers]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_settings(writer, config)
        write_vocabulary(writer, opened.processor(), config.vocab_size, chat=chat)
        kinds = {}
        for name, shape, _ in _tensors(opened, config, family):
            kinds[name] = _kind(gguf, name, shape, numbers)
            block, size = gguf.GGML_QUANT_SIZES[kinds[name]]
            whole = (*shape[:-1], shape[-1] // block * size)
            stored = np.dtype(np.uint8) if block > 1 else np.dtype(f"float{8 * size}")
            bytes_ = int(np.prod(whole)) if block > 1 else int(np.prod(shape)) * size
            writer.add_tensor_info(name, whole if block > 1 else shape, stored, bytes_, kinds[name])
        _finish(writer, lambda: _write_values(gguf, writer, _tensors(opened, config, family), kinds))


def _finish(writer: Any, write_tensors: Callable[[], None]) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if writer.state.name == "KV_DATA" and any(info.tensor is None for each in writer.tensors for info in each.values()):
        writer.write_ti_data_to_file()
    write_tensors()
    writer.close()


def _tensors(
    opened: OpenBase, config: Any, family: GgufFamily
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]]:
    """Yield name, shape and reader of each tensor of the file."""
    names = name_map(family, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    if family.tied and not tied:
        raise ModelError(f"llama.cpp has no place for a head of its own in {config.model_type}", key="base_model")
    for shard, header in opened.shards.items():
        for key, entry in header.items():
            if tied and key == "lm_head.weight":
                continue
            if (name := gguf_name(names, key)) is None:
                continue
            swapped = bool(family.transposed) and key.endswith(family.transposed)
            shape = tuple(reversed(entry.shape)) if swapped else tuple(entry.shape)
            yield name, shape, partial(_read, shard, key, family, config)
    for name, value in more_tensors(config):
        yield name, tuple(value.shape), value.clone


def _read(shard: Path, key: str, family: GgufFamily, config: Any) -> torch.Tensor:
    with safe_open(shard, framework="pt") as file:
        return as_stored(family, config, key, file.get_tensor(key))


def _kind(gguf: Any, name: str, shape: tuple[int, ...], numbers: Numbers) -> Any:
    """Return the number format of a tensor."""
    wanted = "q8_0" if numbers == "q4_0" and name in _ENDS else numbers
    if len(shape) < 2 or name in _EXACT:
        wanted = "f32"
    elif wanted.startswith("q") and shape[-1] % _BLOCK:
        wanted = "f16"
    return getattr(gguf.GGMLQuantizationType, wanted.upper())


def _write_values(gguf: Any, writer: Any, tensors: Iterator[Any], kinds: dict[str, Any]) -> None:
    for name, _, read in tensors:
        value = read().float().contiguous().numpy()
        with np.errstate(over="ignore"):
            made = gguf.quants.quantize(value, kinds[name])
        if made.dtype == np.float16 and not np.isfinite(made).all():
            raise ModelError(f"{name} has values that 16 bits do not hold", key="--dtype", hint="--dtype f32")
        writer.write_tensor_data(made)
