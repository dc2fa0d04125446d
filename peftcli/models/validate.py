"""Checks of a base model's files before transformers reads them, and of its weights afterwards.

transformers trusts a folder: it waits for a pipe, ignores a damaged generation config, fills missing weights with
random numbers, and fetches attention code from the hub if a config names it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from peftcli.core.layer import model_ends
from peftcli.errors import ModelError
from peftcli.guard.files import (
    first_of,
    irregular_kind,
    open_regular,
    read_errors,
    read_json_object,
    short_name,
    short_repr,
)
from peftcli.guard.safetensors_header import TensorEntry, open_safetensors
from peftcli.models.guarded import ALLOW_CODE

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""Where transformers looks for weights, in this order."""
_MAX_JSON_BYTES = 1 << 24
"""Bytes. The labels of a classifier of 20,000 classes take two million."""
_MAX_VOCABULARY_BYTES = 1 << 30
"""Bytes of a vocabulary; the largest known take 40 million."""
_OBJECTS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_FILES = (
    "chat_template.jinja",
    "merges.txt",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
_MAX_LAYERS, _MAX_LABELS = 500, 1_000_000
"""More than any model has."""
_SPARE = 100_000_000
"""Numbers that a model may hold beyond twice those of its files: a new head, or masks."""
_CONVERT = "load it once in transformers where you trust it, and save it again: save_pretrained writes safetensors"


def check_folder(folder: Path, *, trusted: bool = False) -> dict[Path, dict[str, Any]]:
    """Check the small files of a model or tokenizer; return the content of each that must hold a JSON object.

    Weights are checked where they are read. ``trusted`` says that the recipe lets the model's repository run code: no
    file may then name another repository's.

    Raises:
        ModelError: a file is not regular, is not JSON, or has counts that take memory as soon as they are read.
    """
    config = folder / "config.json"
    read = {config: read_config(config)} if os.path.lexists(config) else {}
    if "configuration_files" in read.get(config, {}):  # transformers of some versions read another one in its place
        read |= {path: read_config(path) for path in sorted(folder.glob("config.*.json"))}
    for path, values in read.items():
        _refuse_counts(values, str(path))
    for path in sorted(folder.iterdir()) + sorted(folder.glob("additional_chat_templates/*")):
        if path.name in _OBJECTS:
            if path not in read:
                read[path] = read_config(path)
        elif path.name in _FILES:
            with read_errors(path, ModelError), open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
            if size > _MAX_VOCABULARY_BYTES:
                raise ModelError(f"has {size:,} bytes, too many for a vocabulary", file=str(path))
        elif not path.name.startswith(".") and _would_block(path):
            raise ModelError(f"{irregular_kind(path)}; a model folder must not contain one", file=str(path))
    for path, values in read.items() if trusted else ():
        _refuse_foreign_code(values, str(path))
    return read


def check_config(read: dict[Path, dict[str, Any]], *, trusted: bool) -> None:
    """Raise ModelError for a config.json that names code to run, unless the recipe trusts the model's repository.

    ``read`` is what ``check_folder`` returned: it has checked the rest.
    """
    for path, values in read.items():
        if re.fullmatch(r"config(\..*)?\.json", path.name):
            if not trusted:
                _refuse_own_code(values, str(path))
            _refuse_attention(values, str(path))
            weights_name(values, str(path))


def read_config(path: Path) -> dict[str, Any]:
    """Read a small file of a model that must hold a JSON object; raise ModelError if it does not."""
    return read_json_object(path, _MAX_JSON_BYTES, ModelError, strict=False)


def _refuse_own_code(values: dict[str, Any], file: str) -> None:
    from transformers import CONFIG_MAPPING

    kind = values.get("model_type")
    if "auto_map" in values and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise ModelError(
            "needs Python code that comes with the model, which is not run",
            file=file,
            key="auto_map",
            hint=ALLOW_CODE,
        )


def _refuse_attention(values: dict[str, Any], file: str) -> None:
    for key, value in _settings(values):
        if key.rpartition(".")[2].lstrip("_") in ("attn_implementation", "attn_implementation_internal"):
            for name in value.values() if isinstance(value, dict) else [value]:
                if name is not None and (not isinstance(name, str) or name.removeprefix("paged|") not in _ATTENTION):
                    raise ModelError(
                        f"{short_repr(name)} is not known, and code is not fetched from the hub for it; "
                        f"known: {', '.join(_ATTENTION)}",
                        file=file,
                        key=short_name(key),
                    )


def _refuse_counts(values: dict[str, Any], file: str) -> None:
    for key, value in _settings(values):
        name = key.rpartition(".")[2]
        counts_layers = name.endswith("layers") or name in ("n_layer", "num_layer")
        most = _MAX_LABELS if name.endswith("num_labels") else _MAX_LAYERS if counts_layers else None
        if most and isinstance(value, (int, float)) and not 0 <= value <= most:
            raise ModelError(f"{short_repr(value)} is not a plausible value", file=file, key=short_name(key))


def _refuse_foreign_code(values: dict[str, Any], file: str) -> None:
    for key, code in _settings(values):
        if key.rpartition(".")[2] == "auto_map" and "--" in str(code):
            raise ModelError(
                f"{short_repr(code)} is code from another repository, which the revision does not pin",
                file=file,
                key=short_name(key),
            )


def weights_name(values: dict[str, Any], file: str) -> str | None:
    """Return the file of weights that a config names in place of the usual ones.

    Raises:
        ModelError: it is not the name of a safetensors file in the same folder.
    """
    name = values.get("transformers_weights")
    if name is not None and not (_is_plain(name) and name.endswith((".safetensors", ".safetensors.index.json"))):
        raise ModelError(
            f"{short_repr(name)} is not a safetensors file in the same folder", file=file, key="transformers_weights"
        )
    return name


def listed_shards(index: Path) -> list[str]:
    """Return the names of the files that an index of weights lists, sorted.

    Raises:
        ModelError: it is not such an index, or names files elsewhere.
    """
    names = read_json_object(index, _MAX_JSON_BYTES * 4, ModelError).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError("lists no weights", file=str(index), key="weight_map")
    for tensor, name in names.items():
        if not (_is_plain(name) and name.endswith(".safetensors")):
            raise ModelError(
                f"{short_name(tensor)}: {short_repr(name)} is not a safetensors file in the same folder",
                file=str(index),
                key="weight_map",
            )
    return sorted(set(names.values()))


def read_shard(shard: Path) -> dict[str, TensorEntry]:
    """Return what a file of weights says of its tensors.

    Raises:
        ModelError: it is damaged.
    """
    with open_safetensors(shard, ModelError) as (header, _):
        return header


def check_size(model: Any, shards: Iterable[Mapping[str, TensorEntry]], file: str) -> None:
    """Raise ModelError if the model that a config describes is far larger than its weights, and would exhaust memory.

    The model is on the meta device, ``shards`` are its files of weights, and ``file`` is the one that describes it.
    """
    stored = sum(entry.numel for header in shards for entry in header.values())
    numbers = sum(value.numel() for value in {*model.parameters(), *model.buffers()})
    if numbers > 2 * stored + _SPARE:
        raise ModelError(f"describes a model of {numbers:,} numbers, but its weights have {stored:,}", file=file)


def find_initialised(
    model: nn.Module, info: Mapping[str, Any], name: str, *, new_labels: bool, complete: bool
) -> tuple[tuple[str, ...], str | None]:
    """Tell new heads from damage in transformers' loading info of a model.

    ``new_labels``: the labels are the task's, so that a new head replaces one for other labels. ``complete``: the names
    can be compared; those of quantised weights differ.

    Returns:
        The names of the parameters of new heads, sorted, and a note about heads that were replaced.

    Raises:
        ModelError: the checkpoint lacks weights of the body, of a part of a head or of a language model, or has them in
            other sizes.
    """
    body, heads = find_heads(model)
    names = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    missing, loaded = set(info["missing_keys"]), names - set(info["missing_keys"])
    new = [head for head in heads if not any(key.startswith(f"{head}.") for key in loaded)]
    sizes = {key: (tuple(stored), tuple(needed)) for key, stored, needed in info["mismatched_keys"]}
    replaced = {
        key
        for key, (stored, needed) in sizes.items()
        if new_labels and (any(key.startswith(f"{head}.") for head in heads) or _is_for_labels(model, stored, needed))
    }
    initialised = {key for key in missing if any(key.startswith(f"{head}.") for head in new)}
    # what the body itself holds, as Wav2Vec2's mask embedding, is for pretraining
    lost = {key for key in missing - initialised if key.rpartition(".")[0] != body or body is None}
    damage = [f"{key} is {sizes[key][0]}, not {sizes[key][1]}" for key in sorted(sizes.keys() - replaced)]
    damage += [f"{key} is missing" for key in sorted(lost)]
    inner = getattr(model, "base_model_prefix", "")
    has_body = hasattr(model, inner) and not any(key.startswith(f"{inner}.") for key in lost)
    if body is None and lost and not sizes and has_body:
        absent = ", ".join(first_of(sorted(lost)))
        raise ModelError(
            f"{name} has no trained {type(model).__name__} head: its checkpoint lacks {absent}",
            key="base_model",
            hint="name the model with that head, as it was pretrained; an adapter does not make up for it",
        )
    if damage and complete:
        raise ModelError(
            f"the weights of {name} are not those of its config.json: {', '.join(first_of(damage))}",
            key="base_model",
        )
    heads_replaced = sorted({key.rpartition(".")[0] for key in replaced})
    note = f"{', '.join(heads_replaced)} of {name} was made for other labels; a new one replaces it"
    every = dict(model.named_parameters(remove_duplicate=False))
    shared = {id(value) for key, value in every.items() if key in initialised | replaced}
    return tuple(sorted(key for key in every if id(every[key]) in shared)), note if replaced else None


def _is_for_labels(model: Any, stored: tuple[int, ...], needed: tuple[int, ...]) -> bool:
    """Return whether a weight inside the body has an output for each label, as detectors that score all places have."""
    return needed[:1] == (model.config.num_labels,) and stored[1:] == needed[1:]


def find_heads(model: nn.Module) -> tuple[str | None, list[str]]:
    """Return the body's name and the names of its heads and poolers, which may be new; None of a language model."""
    ends = model_ends(model)
    if ends[1] is not None:
        return None, []
    body = getattr(model, "base_model", model)
    beside = [(name, child) for name, child in model.named_children() if child is not body]
    if body is model and not any(hasattr(child, "base_model_prefix") for _, child in beside):
        beside = []  # the body alone
    heads = [name for name, child in beside if not hasattr(child, "base_model_prefix") and child not in ends]
    prefix = "" if body is model else next(f"{name}." for name, child in model.named_children() if child is body)
    last = next(((n, c) for n, c in reversed(list(body.named_children())) if any(True for _ in c.parameters())), None)
    if last is not None and not isinstance(last[1], nn.ModuleList):
        parts = list(last[1].modules())
        is_head = any(isinstance(part, nn.Linear) for part in parts) and not any(part in ends for part in parts)
        if is_head and not has_stack(last[1]):
            heads.append(prefix + last[0])
    if getattr(body, "pooler", None) is not None and f"{prefix}pooler" not in heads:  # not the last child of each body
        heads.append(f"{prefix}pooler")
    return prefix.rstrip("."), heads


def has_stack(module: nn.Module) -> bool:
    """Return whether the module is or contains a list of layers, as encoders do and heads do not."""
    return any(isinstance(part, nn.ModuleList) for part in module.modules())


def no_weights(folder: str, names: Iterable[str]) -> ModelError:
    """Return the error for a model without safetensors whose folder has files of these names."""
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")))
    if pickles:
        return ModelError(
            f"{short_name(pickles[0])} can run code when it is read, so it is not read; there is no {WEIGHTS[0]}",
            file=folder,
            key="base_model",
            hint=_CONVERT,
        )
    return ModelError(
        f"contains neither {WEIGHTS[0]} nor {WEIGHTS[1]}, so no weights",
        file=folder,
        key="base_model",
        hint=f"add one of them; if the model is in another format, {_CONVERT}",
    )


def _would_block(path: Path) -> bool:
    """Return whether reading it would block, as reading a pipe does."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except OSError:
        return False
    return kind not in (stat.S_IFREG, stat.S_IFDIR)


def _is_plain(name: object) -> bool:
    """Return whether it is a file name and not a path."""
    return isinstance(name, str) and Path(name).name == name and name.isprintable()


def _settings(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all settings of a config and of those inside it, with their paths."""
    for key, value in values.items():
        yield above + key, value
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from _settings(inner, f"{above}{key}.")
