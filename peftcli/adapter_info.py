"""What an adapter folder holds, read from its config and the header of its weights, without torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from peftcli.errors import AdapterError
from peftcli.methods import METHODS

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_LARGEST_HEADER = 1 << 20


def describe(adapter: str) -> dict[str, Any]:
    """The facts about an adapter folder or hub id, as ``peftcli info ADAPTER`` prints them.

    Raises:
        AdapterError: no adapter there, or its files are damaged.
    """
    folder = Path(adapter)
    if not folder.exists():
        from peftcli.hub import local_folder

        folder = local_folder(adapter)
    config = _read_config(folder / CONFIG_FILE)
    shapes = _read_shapes(folder / WEIGHTS_FILE)
    peft_type = config.get("peft_type")
    saved = config.get("modules_to_save")
    return {
        "adapter": adapter,
        "method": next((name for name, row in METHODS.items() if row.peft_type == peft_type), None),
        "peft_type": peft_type,
        "task_type": config.get("task_type"),
        "base_model": config.get("base_model_name_or_path"),
        **{
            name: config[name] for name in ("r", "lora_alpha", "num_virtual_tokens", "target_modules") if name in config
        },
        "modules_to_save": saved,
        "modules_adapted": len(_adapted(shapes, saved if isinstance(saved, list) else [])),
        "parameters": sum(math.prod(shape) for shape, _ in shapes.values()),
        "tensors": len(shapes),
        "dtypes": sorted({dtype for _, dtype in shapes.values()}),
        "bytes": (folder / WEIGHTS_FILE).stat().st_size,
    }


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise AdapterError(f"no {CONFIG_FILE} here; this is no adapter folder", file=str(path.parent))
    try:
        if path.stat().st_size > _LARGEST_HEADER:
            raise AdapterError("larger than 1 MB; this is no adapter config", file=str(path))
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise AdapterError(f"cannot be read: {error.strerror}", file=str(path)) from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"not valid JSON: {error}", file=str(path)) from None
    if not isinstance(values, dict) or not isinstance(values.get("peft_type"), str):
        raise AdapterError("holds no adapter config: a JSON object with a peft_type", file=str(path), key="peft_type")
    return values


def _read_shapes(path: Path) -> dict[str, tuple[list[int], str]]:
    """Tensor name -> shape and dtype."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        hint = "an adapter_model.bin is not read: load it once in PEFT and save it with safe_serialization=True"
        pickled = (path.parent / "adapter_model.bin").exists()
        raise AdapterError(f"no {WEIGHTS_FILE} here", file=str(path.parent), hint=hint if pickled else None)
    try:
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > _LARGEST_HEADER:
                raise AdapterError("damaged: its header is larger than 1 MB", file=str(path))
        with safe_open(path, framework="np") as tensors:
            entries = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: (list(entry.get_shape()), str(entry.get_dtype())) for name, entry in entries.items()}
    except OSError as error:
        raise AdapterError(f"cannot be read: {error.strerror or error}", file=str(path)) from None
    except SafetensorError as error:
        raise AdapterError(f"damaged: {error}", file=str(path)) from None


def _adapted(names: dict[str, Any], saved: list[str]) -> set[str]:
    """Paths of the modules that adapter layers stand over: a name is module path + weight name [+ .weight or .bias]."""
    found = set()
    for name in names:
        module, _, weight = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")
        trained_bias = name.endswith(".bias") and not weight.startswith("lora_")
        if module and not trained_bias and not {weight, *module.split(".")} & set(saved):
            found.add(module)
    return found
