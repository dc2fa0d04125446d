"""What the files of a base model may say, looked at before transformers reads them.

transformers trusts a folder: it waits for a pipe, takes a damaged generation config for none, fills what weights lack
with random numbers, and fetches attention code from the hub that a config names.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from peftcli.errors import ModelError
from peftcli.guard.adapter_header import CONFIG_FILE, opened_safetensors
from peftcli.guard.files import irregular, open_regular, read_object, reason, shown, shown_name

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_JSON = 1 << 24
"""Bytes. The labels of a classifier of 20,000 classes take two million."""
_LARGEST_FILE = 1 << 30
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
    *_OBJECTS,
    INDEX,
    WEIGHTS,
    "chat_template.jinja",
    "merges.txt",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
_MOST_LAYERS, _MOST_LABELS = 500, 1_000_000
"""More than any model has."""
_SPARE = 100_000_000
"""Numbers that a model may hold beyond twice those of its files: a new head, or masks."""
_MOST_SHOWN = 6
_CONVERT = "load it once in transformers where you trust it, and save it again: save_pretrained writes safetensors"


def check_folder(folder: Path, *, trusted: bool = False) -> None:
    """Raises ModelError for what is no file where transformers expects one, and for JSON that is none.

    Also for a config whose numbers take memory as soon as it is read; and where the recipe lets the model's repository
    run code (``trusted``), for JSON that names another one's.
    """
    read = _configs(folder)
    for path, values in read.items():
        _refuse_counts(values, str(path))
    for path in sorted(folder.iterdir()) + sorted(folder.glob("additional_chat_templates/*")):
        if path.name in _FILES:
            try:
                open_regular(path).close()
            except (OSError, ValueError) as error:
                raise ModelError(irregular(path) or f"cannot be read: {reason(error)}", file=str(path)) from None
            if path.name not in (WEIGHTS, *_OBJECTS) and path.stat().st_size > _LARGEST_FILE:
                raise ModelError(f"has {path.stat().st_size:,} bytes, which no vocabulary has", file=str(path))
        elif not path.name.startswith(".") and _would_block(path):
            raise ModelError(f"{irregular(path)}; a model folder holds none", file=str(path))
        if path.name in _OBJECTS and path not in read:
            read[path] = read_object(path, _LARGEST_JSON, ModelError, strict=False)
    for path, values in read.items() if trusted else ():
        _refuse_foreign_code(values, str(path))


def check_config(path: Path, *, trusted: bool) -> None:
    """Raises ModelError for a config.json that names code to run; ``check_folder`` has looked at the rest of it.

    Args:
        path: the file.
        trusted: whether the recipe lets the model's repository run code.
    """
    for config, values in _configs(path.parent).items():
        if not trusted:
            _refuse_own_code(values, str(config))
        _refuse_attention(values, str(config))
        weights_name(values, str(config))


def _configs(folder: Path) -> dict[Path, dict[str, Any]]:
    """The contents of config.json, and of the files that one may name in its place for versions of transformers."""
    path = folder / "config.json"
    found = {path: read_object(path, _LARGEST_JSON, ModelError, strict=False)} if os.path.lexists(path) else {}
    if found and "configuration_files" in found[path]:
        for other in sorted(folder.glob("config.*.json")):
            found[other] = read_object(other, _LARGEST_JSON, ModelError, strict=False)
    return found


def _refuse_own_code(values: dict[str, Any], file: str) -> None:
    from transformers import CONFIG_MAPPING

    kind = values.get("model_type")
    if "auto_map" in values and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise ModelError(
            "needs Python code that comes with the model, which is not run",
            file=file,
            key="auto_map",
            hint="a recipe can allow it, for code that you have read: base_model.trust_remote_code and its revision",
        )


def _refuse_attention(values: dict[str, Any], file: str) -> None:
    for key, value in _settings(values):
        if key.rpartition(".")[2].lstrip("_") in ("attn_implementation", "attn_implementation_internal"):
            for name in value.values() if isinstance(value, dict) else [value]:
                if name is not None and (not isinstance(name, str) or name.removeprefix("paged|") not in _ATTENTION):
                    raise ModelError(
                        f"{shown(name)} is not known, and code is not fetched from the hub for it; "
                        f"known: {', '.join(_ATTENTION)}",
                        file=file,
                        key=shown_name(key),
                    )


def _refuse_counts(values: dict[str, Any], file: str) -> None:
    for key, value in _settings(values):
        most = _MOST_LABELS if key.endswith("num_labels") else _MOST_LAYERS if _counts_layers(key) else None
        if most and isinstance(value, (int, float)) and not 0 <= value <= most:
            raise ModelError(f"{shown(value)} is not what any model has", file=file, key=shown_name(key))


def _refuse_foreign_code(values: dict[str, Any], file: str) -> None:
    for key, code in _settings(values):
        if key.rpartition(".")[2] == "auto_map" and "--" in str(code):
            raise ModelError(
                f"{shown(code)} is code of another repository, which no revision pins", file=file, key=shown_name(key)
            )


def weights_name(values: dict[str, Any], file: str) -> str | None:
    """The file of weights that a config names in place of the usual ones.

    Raises:
        ModelError: it is no name of a safetensors file beside the config.
    """
    name = values.get("transformers_weights")
    if name is not None and not (_is_plain(name) and name.endswith((".safetensors", ".safetensors.index.json"))):
        raise ModelError(f"{shown(name)} is no safetensors file beside it", file=file, key="transformers_weights")
    return name


def listed_shards(index: Path) -> list[str]:
    """The names of the files that an index of weights lists, sorted.

    Raises:
        ModelError: it is no such index, or names files elsewhere.
    """
    names = read_object(index, _LARGEST_JSON * 4, ModelError).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError("lists no weights", file=str(index), key="weight_map")
    for tensor, name in names.items():
        if not (_is_plain(name) and name.endswith(".safetensors")):
            raise ModelError(
                f"{shown_name(tensor)}: {shown(name)} is no safetensors file beside it",
                file=str(index),
                key="weight_map",
            )
    return sorted(set(names.values()))


def count_stored(shards: Iterable[Path]) -> int:
    """How many numbers safetensors files hold together.

    Raises:
        ModelError: one is not whole.
    """
    count = 0
    for shard in shards:
        with opened_safetensors(shard, ModelError) as (header, _):
            count += sum(entry.numel for entry in header.values())
    return count


def check_size(model: Any, stored: int, file: str) -> None:
    """Raises ModelError if the model that a config describes is far larger than its weights, so that memory is lost.

    Args:
        model: on the meta device.
        stored: how many numbers its files hold.
        file: says what the model is.
    """
    numbers = sum(value.numel() for value in {*model.parameters(), *model.buffers()})
    if numbers > 2 * stored + _SPARE:
        raise ModelError(f"describes a model of {numbers:,} numbers, and its weights are {stored:,}", file=file)


def check_loaded(model: Any, said: dict[str, Any], name: str) -> None:
    """Raises ModelError if transformers has filled weights of the body, or of a language model's head, with noise.

    Args:
        model: what was loaded.
        said: transformers' loading info.
        name: of the base model.
    """
    wrong = [
        f"{key} is {tuple(stored)}, not {tuple(needed)}" for key, stored, needed in sorted(said["mismatched_keys"])
    ]
    whole = type(model).__name__.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel"))
    missing = [key for key in sorted(said["missing_keys"]) if whole or re.search(r"\.\d+\.", key)]
    wrong += [f"{key} is missing" for key in missing]
    if wrong:
        more = f", and {len(wrong) - _MOST_SHOWN} more" if len(wrong) > _MOST_SHOWN else ""
        raise ModelError(
            f"the weights of {name} are not those of its config.json: {', '.join(wrong[:_MOST_SHOWN])}{more}",
            key="base_model",
        )


def no_weights(folder: str, names: Iterable[str]) -> ModelError:
    """The error for a model without safetensors, which holds files of these names."""
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")))
    if pickles:
        return ModelError(
            f"{shown_name(pickles[0])} can run code when it is read, and is not; there is no {WEIGHTS}",
            file=folder,
            key="base_model",
            hint=_CONVERT,
        )
    return ModelError(
        f"holds neither {WEIGHTS} nor {INDEX}, and weights of other kinds are not read",
        file=folder,
        key="base_model",
        hint=_CONVERT,
    )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter: transformers would load that, and what it names as its base."""
    return irregular(folder / CONFIG_FILE) is not None or (folder / CONFIG_FILE).exists()


def _would_block(path: Path) -> bool:
    """Whether a reader would wait at it, as at a pipe."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except OSError:
        return False
    return kind not in (stat.S_IFREG, stat.S_IFDIR)


def _is_plain(name: object) -> bool:
    """Whether it is a file's name, and no path."""
    return isinstance(name, str) and Path(name).name == name and name.isprintable()


def _counts_layers(key: str) -> bool:
    name = key.rpartition(".")[2]
    return name.endswith("layers") or name in ("n_layer", "num_layer")


def _settings(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """All settings of a config and of those inside it, with their paths."""
    for key, value in values.items():
        yield above + key, value
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from _settings(inner, f"{above}{key}.")
