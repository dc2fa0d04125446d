"""The file that text_to_image writes for diffusers: pipelines of each kind make the pictures that peftcli makes."""

import tempfile
from pathlib import Path

import peftcli.peft_api

peftcli.peft_api.install(version="0.22.0")

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusionkit import SIDE, pipeline_base
from taskkit import CASES
from trainkit import run_recipe

from peftcli.adapters.load import apply_adapter, find_adapter
from peftcli.models.open import open_base


def picture(pipeline: DiffusionPipeline) -> np.ndarray:
    draw = torch.Generator().manual_seed(3)
    made = pipeline("a red dog", num_inference_steps=2, height=SIDE, width=SIDE, generator=draw, output_type="np")
    return made.images[0]


for kind, parts in {
    "sd": ["text_encoder", "unet"],
    "sdxl": ["text_encoder", "text_encoder_2", "unet"],
    "sd3": ["text_encoder", "text_encoder_2", "transformer"],
    "flux": ["text_encoder", "transformer"],
}.items():
    recipe = CASES["text_to_image"].write(Path(tempfile.mkdtemp()))
    settings = (f"base_model={pipeline_base(kind)}", "task.train_text_encoder=true", f"task.resolution={SIDE}")
    folder = run_recipe(recipe, *settings, "training.learning_rate=0.05", "method.use_rslora=true").folder
    assert sorted(path.parent.name for path in folder.glob("*/adapter_config.json") if "step" not in str(path)) == parts
    source = find_adapter(str(folder))
    loaded = open_base(source.base).model("", torch.float32, **source.recorded_options)
    apply_adapter(loaded, source)
    pipeline = DiffusionPipeline.from_pretrained(pipeline_base(kind))
    before = picture(pipeline)
    pipeline.load_lora_weights(folder)
    after = picture(pipeline)
    assert np.abs(after - before).max() > 0.02, kind
    np.testing.assert_allclose(after, picture(loaded.model.pipeline), atol=1e-5, err_msg=kind)
