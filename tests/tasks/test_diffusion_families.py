"""Kinds of diffusion pipelines: what each row computes is what the pipeline of diffusers computes by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusionkit import LARGE, SIDE, picture_files, pipeline_base
from PIL import Image
from taskkit import CASES, EDITED
from trainkit import run_recipe

from peftcli.adapters.load import apply_adapter, find_adapter
from peftcli.errors import ModelError
from peftcli.models import diffusion
from peftcli.models.diffusion_families import FAMILIES
from peftcli.models.open import open_base
from peftcli.schema import BaseModel

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # a scheduler's
PROMPTS = ["a red dog", "a drawing of a large house"]
KINDS = [*LARGE, "sd", "sdxl", "sd3", "flux", "flux_kontext"]
GUIDED = {"flux": 3.5, "flux_kontext": 3.5, "flux2": 3.5, "z_image": 0.0}
"""Guidance scale of a loop that calls the denoiser once a step, where it is not 1."""


def opened(kind: str) -> Any:
    return open_base(BaseModel(name=str(pipeline_base(kind)))).model("", torch.float32).model


def packed(kind: str, pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the pipeline's own loop holds them."""
    if kind in ("flux", "flux_kontext", "qwen_image"):
        return pipeline._pack_latents(latents, *latents.shape)
    return pipeline._pack_latents(latents) if kind.startswith("flux2") else latents


def test_each_kind_has_a_tiny_pipeline() -> None:
    assert len(KINDS) == len(FAMILIES)


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_and_latents_are_those_of_the_pipeline(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    model = opened(kind)
    pipeline, seen = model.pipeline, []
    if kind == "sdxl":  # a scheduler that leaves latents as they are
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)

    def record(predicted: torch.Tensor, step: torch.Tensor, latents: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        seen.append((predicted, step))
        return (latents,)

    monkeypatch.setattr(pipeline.scheduler, "step", record)
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    given = [diffusion.Picture(lambda at=at: pixels[at]) for at in range(2)]
    with torch.no_grad():
        model._moments, drawn = without_noise(model._moments), model._draw_latents
        clean, _ = drawn(given, [0, 1])
        options = {"guidance_scale": GUIDED.get(kind, 1.0), "num_inference_steps": 2, "output_type": "pt"}
        latents = clean if kind.startswith("flux2") else packed(kind, pipeline, clean)
        source = {}
        if model.family.edits:
            options["image"] = pixels.flip(0) / 2 + 0.5
            source = {"source": drawn([*reversed(given)], [0, 1])[0]}
        made = pipeline(latents=latents, **model.family.arguments(PROMPTS, SIDE, options)).images
        sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 2)
        for predicted, step in seen:
            ours = model.predict(clean, step.expand(2), {"sizes": sizes, **source, **model._encode_cached(PROMPTS)})
            assert ours.abs().max() > 1e-3
            torch.testing.assert_close(packed(kind, pipeline, ours), predicted, rtol=1e-4, atol=1e-5)
        assert len(seen) == 2
        raw = pipeline.vae.encode(pixels[:, :, None] if kind == "qwen_image" else pixels)
        decoded = pipeline.vae.decode(raw.latent if kind == "sana" else raw.latent_dist.mean).sample
        expected = (decoded[:, :, 0] if kind == "qwen_image" else decoded) / 2 + 0.5
    torch.testing.assert_close(made, expected.clamp(0, 1), rtol=1e-4, atol=1e-4)


def without_noise(moments: Callable[..., diffusion.Tensors]) -> Callable[..., diffusion.Tensors]:
    def found(picture: diffusion.Picture) -> diffusion.Tensors:
        values = moments(picture)
        return {**values, "log": torch.full_like(values["log"], -torch.inf)}

    return found


def picture(pipeline: Any, family: Any) -> np.ndarray:
    draw = torch.Generator().manual_seed(3)
    given = family.arguments(["a red dog"], SIDE, {"num_inference_steps": 2})
    if family.edits:
        given["image"] = Image.open(picture_files(12)[0]).crop((0, 0, SIDE, SIDE))
    made = pipeline(generator=draw, output_type="np", **given)
    return made.images[0]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "qwen_image")) for kind in KINDS]
)
def test_diffusers_loads_the_adapter_at_the_trained_strength(kind: str, tmp_path: Path) -> None:
    import diffusers

    settings = (f"base_model={pipeline_base(kind)}", f"task.resolution={SIDE}", "training.learning_rate=0.05")
    case = EDITED if kind == "flux_kontext" else CASES["text_to_image"]
    done = run_recipe(case.write(tmp_path), *settings, "method.use_rslora=true")
    source = find_adapter(str(done.folder))
    loaded: Any = open_base(source.base).model("", torch.float32, **source.recorded_options)
    apply_adapter(loaded, source)
    family, pipeline = loaded.model.family, diffusers.DiffusionPipeline.from_pretrained(pipeline_base(kind))
    before = picture(pipeline, family)
    pipeline.load_lora_weights(done.folder)
    after = picture(pipeline, family)
    assert np.abs(after - before).max() > 0.02, kind
    np.testing.assert_allclose(after, picture(loaded.model.pipeline, family), atol=1e-5)


def test_a_language_model_that_reads_prompts_is_not_adapted() -> None:
    base = open_base(BaseModel(name=str(pipeline_base("sana"))))
    with pytest.raises(ModelError, match="SanaPipeline reads prompts with a language model") as caught:
        base.empty_model("", train_text_encoder=True)
    assert caught.value.key == "task.train_text_encoder"
