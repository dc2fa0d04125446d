"""A LoRA as mlx-lm has it: matrices the other way round, ``scale`` in place of lora_alpha / r."""

from __future__ import annotations

import json
import re
from pathlib import Path

from peftcli.adapters.export.lora import PlainLora
from peftcli.core.files import write_tensor_file
from peftcli.models.open import OpenBase
from peftcli.system.disk import write_file

_LAYER = re.compile(r"(?:model|transformer)\.(?:layers|h)\.(\d+)\.(.+)")
"""Path of a module in a layer, and in it the layer's number and the module's path in the layer."""


def write_mlx(lora: PlainLora, opened: OpenBase, folder: Path) -> None:
    """Write ``adapters.safetensors`` with A^T (in, r) and B^T (r, out), and ``adapter_config.json``."""
    keys, tensors = set[str](), {}
    for path, update in lora.updates.items():
        found = _LAYER.fullmatch(path)
        keys.add(found[2] if found else path)
        name = re.sub(r"^transformer\.", "model.", path)
        tensors[f"{name}.lora_a"] = update.right.T.contiguous()
        tensors[f"{name}.lora_b"] = update.left.T.contiguous()
    write_tensor_file(folder / "adapters.safetensors", tensors)
    config = {
        "fine_tune_type": "lora",
        "num_layers": opened.config.get_text_config().num_hidden_layers,
        "lora_parameters": {"rank": lora.r, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    write_file(folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())
