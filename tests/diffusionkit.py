"""Tiny diffusion pipelines, made from configs: shaped as Stable Diffusion, its XL, its third version, and Flux."""

from __future__ import annotations

import functools
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from trainkit import scratch

SIDE = 32
"""Width and height of the pictures."""


def _clip_tokenizer(folder: Path) -> Any:
    """A tokenizer that knows letters, and those that end a word."""
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces = [*letters, *(f"{each}</w>" for each in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({piece: at for at, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def _t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    return T5Tokenizer(vocab=[(piece, 0.0 if at < 3 else -1.0) for at, piece in enumerate(pieces)], extra_ids=0)


def _clip(vocabulary: int, *, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5(width: int = 16) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=30, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def _vae(channels: int = 4, **more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **more,
    )


def _unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        **{"cross_attention_dim": 16, **more},
    )


def _sd(scheduler: str = "epsilon") -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokenizer = _clip_tokenizer(scratch() / f"clip-tokenizer-{scheduler}")
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(len(tokenizer)),
        tokenizer=tokenizer,
        unet=_unet(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            set_alpha_to_one=False,
            prediction_type=scheduler,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer = _clip_tokenizer(scratch() / "clip-tokenizer-xl")
    unet = _unet(
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 16,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip(len(tokenizer)),
        text_encoder_2=_clip(len(tokenizer), projected=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def _sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer = _clip_tokenizer(scratch() / "clip-tokenizer-3")
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        vae=_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(len(tokenizer), projected=True),
        text_encoder_2=_clip(len(tokenizer), projected=True),
        text_encoder_3=_t5(32),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=_t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer = _clip_tokenizer(scratch() / "clip-tokenizer-flux")
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    return FluxPipeline(
        vae=_vae(4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(len(tokenizer)),
        text_encoder_2=_t5(),
        tokenizer=tokenizer,
        tokenizer_2=_t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


_KINDS = {
    "sd": _sd,
    "v": functools.partial(_sd, "v_prediction"),
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
}


@functools.cache
def pipeline_base(kind: str) -> Path:
    """The folder of a tiny pipeline."""
    folder = scratch() / f"pipeline-{kind}"
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        _KINDS[kind]().save_pretrained(folder)
    return folder


@functools.cache
def picture_files(count: int = 6) -> list[Path]:
    """Small pictures of noise around a colour."""
    draw, folder = np.random.default_rng(0), scratch() / "text-to-image"
    folder.mkdir()
    files = []
    for number in range(count):
        colour = [(230, 40, 40), (40, 40, 230)][number % 2]
        pixels = np.clip(np.array(colour) + draw.normal(0, 20, (SIDE, SIDE + 8, 3)), 0, 255).astype(np.uint8)
        files.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(files[-1])
    return files
