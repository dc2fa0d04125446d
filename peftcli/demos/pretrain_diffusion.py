"""A Stable Diffusion in miniature; the demo's makes pictures of signs: stars, umbrellas, planes, but no hearts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from peftcli.demos.pictures import SEED, SIGNS, TAUGHT, sign
from peftcli.demos.pretrain import fit
from peftcli.demos.pretrain_pictures import pixels

SIDE, _BATCH, _EACH = 32, 32, 60
_EMPTY = 0.1
"""Share of the pictures whose prompt is left out, which guidance needs."""


def make(scratch: Path, folder: Path) -> None:
    """Train the pipeline, and save it."""
    draw = np.random.default_rng(SEED)
    names = [name for name in SIGNS if name != TAUGHT for _ in range(_EACH)]
    drawn = np.stack([sign(name, draw) for name in names])
    words = ("a", "photo", "of", *sorted(SIGNS))
    fit_pipeline(drawn, names, words, draw, scratch, (150, 350), (4e-3, 2e-3)).save_pretrained(folder)


def fit_pipeline(
    pictures: np.ndarray,
    names: Sequence[str],
    words: Sequence[str],
    draw: np.random.Generator,
    scratch: Path,
    steps: tuple[int, int],
    rates: tuple[float, float],
    tell: Callable[[str], None] | None = None,
) -> Any:
    """Return a pipeline that is trained on pictures.

    An autoencoder first learns to make 256 numbers of a picture; then a UNet and a text encoder learn to make these
    numbers of noise and a prompt: "a photo of a star".

    Args:
        pictures: Grey ones, (N, 32, 32), uint8.
        names: What each shows.
        words: All words of prompts.
        draw: Decides on the pictures of each step.
        scratch: An empty folder.
        steps: Of the autoencoder and of the rest.
        rates: Their largest learning rates.
        tell: As in ``fit``.
    """
    torch.manual_seed(SEED)
    shown = pixels(pictures)  # (N, 3, S, S)
    vae = _fit_autoencoder(shown, draw, steps[0], rates[0], tell)
    vae.requires_grad_(False).eval()
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in shown.split(200)])  # (N, 4, 8, 8)
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    pipeline = _untrained(vae, _tokenizer(words, scratch))
    latents = latents * vae.config.scaling_factor

    def loss() -> torch.Tensor:
        chosen = draw.integers(0, len(latents), _BATCH)
        prompts = ["" if draw.random() < _EMPTY else f"a photo of a {names[at]}" for at in chosen]
        states = pipeline.encode_prompt(prompts, torch.device("cpu"), 1, False)[0]
        noise = torch.randn(_BATCH, *latents.shape[1:])
        times = torch.randint(0, pipeline.scheduler.config.num_train_timesteps, (_BATCH,))
        noisy = pipeline.scheduler.add_noise(latents[chosen], noise, times)
        return F.mse_loss(pipeline.unet(noisy, times, states).sample, noise)

    weights = [*pipeline.unet.parameters(), *pipeline.text_encoder.parameters()]
    fit(weights, loss, steps[1], rates[1], tell=tell)
    return pipeline


def _fit_autoencoder(
    shown: torch.Tensor, draw: np.random.Generator, steps: int, rate: float, tell: Callable[[str], None] | None
) -> Any:
    """Train a small autoencoder on pictures of shape (N, 3, S, S)."""
    vae: Any = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )

    def picture_loss() -> torch.Tensor:
        wanted = shown[draw.integers(0, len(shown), _BATCH)]
        found = vae.encode(wanted).latent_dist
        return F.l1_loss(vae.decode(found.sample()).sample, wanted) + 1e-6 * found.kl().mean()

    fit(vae.parameters(), picture_loss, steps, rate, tell=tell)
    return vae


def _untrained(vae: Any, tokenizer: CLIPTokenizer) -> Any:
    """The pipeline around an autoencoder."""
    last = len(tokenizer) - 1
    texts = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=last - 1,
            eos_token_id=last,
            pad_token_id=last,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE // 4,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=texts,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _tokenizer(words: Sequence[str], scratch: Path) -> CLIPTokenizer:
    """A tokenizer of letters and of the words of the prompts, each merged from its letters one by one."""
    letters = sorted({letter for word in words for letter in word})
    pieces, merges = [*letters, *(f"{each}</w>" for each in letters)], list[str]()
    for word in words:
        made = word[0] if len(word) > 1 else f"{word}</w>"
        for at, letter in enumerate(word[1:], start=2):
            letter += "</w>" * (at == len(word))
            merges.append(f"{made} {letter}")
            made += letter
            pieces.append(made)
    pieces = list(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    (scratch / "vocab.json").write_text(json.dumps({piece: at for at, piece in enumerate(pieces)}), encoding="utf-8")
    lines = "\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n"
    (scratch / "merges.txt").write_text(lines, encoding="utf-8")
    return CLIPTokenizer.from_pretrained(scratch, model_max_length=16)
