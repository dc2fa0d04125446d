"""Pretrain a small text-to-image pipeline, shaped as Stable Diffusion, on Fashion-MNIST pictures of all kinds but bags.

    python configs/tasks/pretrain_text_to_image.py data/fashion-mnist/train models/tiny-diffusion   # some minutes

An autoencoder first learns to make 256 numbers of a picture of 32 x 32 pixels; then a UNet and a text encoder learn to
make these numbers of noise and a prompt: "a photo of a dress". A folder that exists is left alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from fetch import CLASSES, SEED
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIDE, BATCH, LEFT_OUT = 32, 32, "bag"
PICTURE_STEPS, STEPS = 300, 1200
WORDS = ["a", "photo", "of", "an", "sks", *sorted({part for name in CLASSES for part in name.split("-")}), "-"]
EMPTY = 0.1
"""Share of the pictures whose prompt is left out, which guidance needs."""


def main() -> None:
    """Train, and save the pipeline."""
    if len(sys.argv) != 3:
        sys.exit("usage: pretrain_text_to_image.py PICTURES FOLDER")
    folder = Path(sys.argv[2])
    if folder.exists():
        print(f"pretrain: {folder} is there already")
        return
    files = [path for path in sorted(Path(sys.argv[1]).glob("*/*.png")) if path.parent.name != LEFT_OUT]
    held = np.stack([np.asarray(Image.open(path).resize((SIDE, SIDE))) for path in files])
    held = np.concatenate([held, held[:, :, ::-1]])  # mirrored, too
    pictures = torch.from_numpy(held).float() / 127.5 - 1  # (N, H, W)
    kinds = [path.parent.name for path in files] * 2
    torch.manual_seed(SEED)
    vae: Any = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )
    draw = np.random.default_rng(SEED)
    train_autoencoder(vae, pictures, draw)
    latents = encode(vae, pictures)
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    pipeline = untrained(vae, folder)
    train(pipeline, latents * vae.config.scaling_factor, kinds, draw)
    pipeline.save_pretrained(folder)
    print(f"pretrain: {sum(weight.numel() for weight in pipeline.unet.parameters()):,} parameters in {folder}")


def untrained(vae: Any, folder: Path) -> Any:
    """The pipeline around an autoencoder."""
    tokenizer = words_tokenizer(folder.with_name(f".{folder.name}.words"))
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


def words_tokenizer(folder: Path) -> CLIPTokenizer:
    """A tokenizer of letters and of the words of the prompts, each merged from its letters one by one."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted({letter for word in WORDS for letter in word})
    pieces, merges = [*letters, *(f"{each}</w>" for each in letters)], list[str]()
    for word in WORDS:
        made = word[0] if len(word) > 1 else f"{word}</w>"
        for at, letter in enumerate(word[1:], start=2):
            letter += "</w>" * (at == len(word))
            merges.append(f"{made} {letter}")
            made += letter
            pieces.append(made)
    pieces = list(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    (folder / "vocab.json").write_text(json.dumps({piece: at for at, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=16)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    return tokenizer


def batch_of(count: int, draw: np.random.Generator) -> np.ndarray:
    """Numbers of the pictures of one step."""
    return draw.integers(0, count, BATCH)


def train_autoencoder(vae: Any, pictures: torch.Tensor, draw: np.random.Generator) -> None:
    """Train the autoencoder on pictures (N, H, W)."""
    optimizer, started = torch.optim.AdamW(vae.parameters(), lr=2e-3), time.perf_counter()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=PICTURE_STEPS, pct_start=0.1)
    for step in range(1, PICTURE_STEPS + 1):
        wanted = pictures[batch_of(len(pictures), draw)][:, None].expand(-1, 3, -1, -1)
        found = vae.encode(wanted).latent_dist
        loss = F.l1_loss(vae.decode(found.sample()).sample, wanted) + 1e-6 * found.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            seconds = time.perf_counter() - started
            print(f"pretrain: autoencoder, step {step} of {PICTURE_STEPS}: {loss:.3f}, {seconds:.0f} s", flush=True)
    vae.requires_grad_(False).eval()


def encode(vae: Any, pictures: torch.Tensor) -> torch.Tensor:
    """Latents (N, 4, h, w) of pictures (N, H, W), which are not drawn."""
    parts = [vae.encode(part[:, None].expand(-1, 3, -1, -1)).latent_dist.mean for part in pictures.split(500)]
    return torch.cat(parts)


def train(pipeline: Any, latents: torch.Tensor, kinds: Sequence[str], draw: np.random.Generator) -> None:
    """Train UNet and text encoder to find the noise in noisy latents."""
    weights = [*pipeline.unet.parameters(), *pipeline.text_encoder.parameters()]
    optimizer, started, total = torch.optim.AdamW(weights, lr=1e-3), time.perf_counter(), 0.0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=STEPS, pct_start=0.1)
    scheduler = pipeline.scheduler
    for step in range(1, STEPS + 1):
        chosen = batch_of(len(latents), draw)
        prompts = ["" if draw.random() < EMPTY else f"a photo of a {kinds[at]}" for at in chosen]
        states = pipeline.encode_prompt(prompts, torch.device("cpu"), 1, False)[0]
        clean, noise = latents[chosen], torch.randn(BATCH, *latents.shape[1:])
        steps = torch.randint(0, scheduler.config.num_train_timesteps, (BATCH,))
        found = pipeline.unet(scheduler.add_noise(clean, noise, steps), steps, states).sample
        loss = F.mse_loss(found, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % 100 == 0:
            seconds = time.perf_counter() - started
            print(f"pretrain: step {step} of {STEPS}: {total / 100:.3f}, {seconds:.0f} s", flush=True)
            total = 0.0


if __name__ == "__main__":
    main()
