"""An adapter of a pipeline as other tools read it: PEFT's folder of each part, and diffusers' file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftcli.core.files import load_adapter, read_config, read_tensors, write_adapter, write_tensor_file
from peftcli.core.layer import AdapterLayer
from peftcli.core.targets import pattern_value, shortest_names
from peftcli.methods import config_from_dict
from peftcli.tasks import DIFFUSERS_FILE

_PATTERNS = ("rank_pattern", "alpha_pattern")
_PLAIN = {"bias", "init_lora_weights", "lora_alpha", "lora_dropout", "r", "use_dora", "use_rslora", *_PATTERNS}
"""Settings of a LoRA that diffusers' file can do without, or holds; with others the adapter computes otherwise."""
_ABOUT = {
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "peft_type",
    "peft_version",
    "revision",
    "target_modules",
    "task_type",
}
"""Settings that do not change what an adapter computes."""
_TENSORS = {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}


def write_parts(empty: Any, folder: Path) -> list[str]:
    """Write, beside a pipeline's adapter, the same one for other readers.

    ``empty``: the parts that may be adapted, on the meta device, as one module.

    Returns:
        Names of the files: an adapter folder of each adapted part and, of a plain LoRA, the file of diffusers, with
        every strength folded into B, so that readers need no alpha.
    """
    values, tensors = read_config(folder), read_tensors(folder)
    config: Any = config_from_dict(values)
    layers = load_adapter(empty, config_from_dict(values), folder).layers
    names, found, described = list[str](), dict[str, torch.Tensor](), dict[str, Any]()
    for part in empty.trained:
        own = {path.removeprefix(f"{part}."): layer for path, layer in layers.items() if path.startswith(f"{part}.")}
        if not own:
            continue
        of_part = _config_of(config, part, empty.get_submodule(part), list(own))
        write_adapter(_tensors_of(tensors, config.file_prefix, part, empty.trained), of_part, folder / part)
        names += [f"{part}/{path.name}" for path in sorted((folder / part).iterdir())]
        if _is_plain(values, own.values()):
            found |= {f"{part}.{name}": value for name, value in _factors(part, own).items()}
            described |= {f"{part}.{name}": value for name, value in _described(of_part).items()}
    if found:
        about = {"lora_adapter_metadata": json.dumps(described, indent=2, sort_keys=True)}
        write_tensor_file(folder / DIFFUSERS_FILE, found, about)
        names.append(DIFFUSERS_FILE)
    return names


def _is_plain(values: Mapping[str, Any], layers: Iterable[AdapterLayer]) -> bool:
    """Whether an adapter is a LoRA of two factors a layer, which is all that diffusers' file can hold."""
    known = values["peft_type"] == "LORA" and values.get("bias", "none") == "none" and values.keys() <= _PLAIN | _ABOUT
    return known and all(set(layer.own_tensors()) <= _TENSORS for layer in layers)


def _config_of(config: Any, part: str, model: nn.Module, names: list[str]) -> Any:
    """The config of the same adapter in one part alone, whose modules of these names it adapts."""
    changes: dict[str, Any] = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    changes["target_modules"] = shortest_names(model, names)
    for key in _PATTERNS:
        patterns = {name.removeprefix(f"{part}."): value for name, value in getattr(config, key, {}).items()}
        changes[key] = {
            pattern: value
            for pattern, value in patterns.items()
            if any(pattern_value({pattern: 1}, name, 0) for name in names)
        }
    return replace(config, **{key: value for key, value in changes.items() if hasattr(config, key)})


def _tensors_of(
    tensors: Mapping[str, torch.Tensor], prefix: str, part: str, parts: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """The tensors of one part, as its own adapter names them, and those that all parts share."""
    others = tuple(f"{prefix}{other}." for other in parts if other != part)
    own = {name: value for name, value in tensors.items() if not name.startswith(others)}
    return {name.replace(f"{prefix}{part}.", prefix, 1): value for name, value in own.items()}


def _factors(part: str, layers: Mapping[str, AdapterLayer]) -> dict[str, torch.Tensor]:
    """The tensors of a part's layers, the strength of each in its B.

    Names in CLIP's text models begin with ``text_model``, which transformers 5 has left out and diffusers expects.
    """
    found = {}
    for path, layer in layers.items():
        full = f"text_model.{path}" if part.startswith("text_encoder") and path.startswith("encoder.") else path
        for name, value in layer.own_tensors().items():
            found[f"{full}.{name}"] = value.data * (layer.scaling if name.startswith("lora_B") else 1)
    return found


def _described(config: Any) -> dict[str, Any]:
    """A part's LoRA without a strength, as PEFT's ``LoraConfig`` takes it."""
    values = {name: value for name, value in config.file_dict().items() if name in ("r", "target_modules", "use_dora")}
    ranks = config.rank_pattern
    return {**values, "lora_alpha": config.r, "rank_pattern": ranks, "alpha_pattern": ranks, "peft_type": "LORA"}
