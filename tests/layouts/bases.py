"""Base models of the layouts: configs alone, which ``init`` reads, and models that train.

The real ones come out of Python packages (see configs/tasks/fetch.py) and are kept in the folder that PEFTCLI_MODELS
names, by default models/; where none can be had there is a tiny one with random weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MODELS = Path(os.environ.get("PEFTCLI_MODELS", ROOT / "models"))
_TEXT = {"vocab_size": 32128, "max_position_embeddings": 512}
_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "encoder": ("config.json", "BertModel", {"model_type": "bert", **_TEXT}),
    "chat": ("config.json", "LlamaForCausalLM", {"model_type": "llama", "num_key_value_heads": 3, **_TEXT}),
    "seq2seq": (
        "config.json",
        "T5ForConditionalGeneration",
        {"model_type": "t5", "is_encoder_decoder": True, "d_model": 512, "n_positions": 512, "vocab_size": 32128},
    ),
    "whisper": (
        "config.json",
        "WhisperForConditionalGeneration",
        {"model_type": "whisper", "is_encoder_decoder": True, "num_mel_bins": 80, "vocab_size": 51864},
    ),
    "pictures": (
        "config.json",
        "ViTModel",
        {"model_type": "vit", "image_size": 224, "patch_size": 16, "num_channels": 3},
    ),
    "masks": (
        "config.json",
        "SegformerModel",
        {"model_type": "segformer", "num_channels": 3, "patch_sizes": [7, 3, 3, 3]},
    ),
    "pipeline": ("model_index.json", "StableDiffusionPipeline", {"unet": ["diffusers", "UNet2DConditionModel"]}),
}
"""Kind -> file, class, and what else the file says."""
_FETCHED = {
    "encoder": ("configs/tasks/fetch.py", "minilm", "MiniLM-L6"),
    "chat": ("configs/quickstart/fetch_model.py", "", "SmolLM2-135M-Instruct"),
    "whisper": ("configs/tasks/fetch.py", "whisper", "whisper-tiny.en"),
}
_MADE = {
    "encoder": "from classifierkit import classifier_base; made = classifier_base('bert')",
    "chat": "from classifierkit import classifier_base; made = classifier_base('chat')",
    "whisper": "from soundkit import whisper_base; made = whisper_base()",
    "seq2seq": "from trainkit import base_folder; made = base_folder('t5', chat=False)",
    "pictures": "from classifierkit import classifier_base; made = classifier_base('vit')",
    "masks": "from classifierkit import classifier_base; made = classifier_base('segformer')",
    "pipeline": "from diffusionkit import pipeline_base; made = pipeline_base('sd')",
}
NAMES = {
    "encoder": "MiniLM-L6",
    "chat": "SmolLM2-135M-Instruct",
    "whisper": "Whisper tiny.en",
    "seq2seq": "tiny T5 (random)",
    "pictures": "tiny ViT (random)",
    "masks": "tiny SegFormer (random)",
    "pipeline": "tiny Stable Diffusion (random)",
}


def write_config(kind: str, folder: Path) -> Path:
    """Write what names the model's class and return the folder; there are no weights."""
    file, architecture, more = _CONFIGS[kind]
    key = "_class_name" if kind == "pipeline" else "architectures"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps({key: architecture if kind == "pipeline" else [architecture], **more}))
    return folder


def trainable(kind: str, *, real: bool = True) -> Path:
    """Return a folder with a model that trains, which is fetched or made if it is not there."""
    if real and kind in _FETCHED:
        script, name, folder = _FETCHED[kind]
        target = MODELS / folder
        if not target.exists():
            subprocess.run([sys.executable, ROOT / script, *filter(None, [name]), target], check=True)
        return target
    target = MODELS / f"layouts-{kind}"
    if not target.exists():
        code = f"import shutil; {_MADE[kind]}; shutil.copytree(made, {str(target)!r})"
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": paths})
    return target
