"""Adapter folders made without torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

REPO = "alice/my-adapter"


def make_folder(path: Path, **config: Any) -> Path:
    (path / "checkpoints" / "step-000001").mkdir(parents=True)
    write_config(path, **config)
    (path / "adapter_model.safetensors").write_bytes(safetensors_bytes(4))
    (path / "loss.png").write_bytes(b"\x89PNG")
    (path / "tokenizer.json").write_text("{}")
    for name in ("recipe.yaml", "run.json", "metrics.jsonl", "train.log", "checkpoints/step-000001/state.json"):
        (path / name).write_text("{}")
    return path


def write_config(path: Path, **changes: Any) -> None:
    config = {
        "base_model_name_or_path": "acme/tiny-base",
        "lora_alpha": 16,
        "peft_type": "LORA",
        "r": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    (path / "adapter_config.json").write_text(json.dumps({**config, **changes}, indent=2, sort_keys=True) + "\n")


def safetensors_bytes(numbers: int) -> bytes:
    """A file of one tensor."""
    offsets = {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "base_model.model.q_proj.lora_A.weight": offsets}).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack(f"<{numbers}f", *range(numbers))
