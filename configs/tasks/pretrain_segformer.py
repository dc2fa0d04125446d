"""Pretrain a small SegFormer encoder on Fashion-MNIST pictures that the recipe does not train on, without labels.

    python configs/tasks/pretrain_segformer.py data/fashion-mnist/rest.npz models/segformer-garments   # some minutes

The model learns, pixel by pixel, how far each garment of a scene has been turned: 0, 90, 180 or 270 degrees
(https://arxiv.org/abs/1803.07728). Its decode head is thrown away, so the folder holds an encoder and an image
processor. A folder that exists is left alone.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from fetch import SCENE, scene
from torch.nn import functional as F
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessorPil

SEED = 0
STEPS = 1500
BATCH = 32
LEARNING_RATE = 2e-3
TURNS = 4


def main() -> None:
    """Train, and save the encoder."""
    if len(sys.argv) != 3:
        sys.exit("usage: pretrain_segformer.py REST.npz FOLDER")
    folder = Path(sys.argv[2])
    if folder.exists():
        print(f"pretrain: {folder} is there already")
        return
    images = np.load(sys.argv[1])["images"]
    torch.manual_seed(SEED)
    model = SegformerForSemanticSegmentation(
        SegformerConfig(
            depths=[1, 1, 1, 1],
            hidden_sizes=[24, 48, 72, 96],
            num_attention_heads=[1, 2, 3, 4],
            sr_ratios=[4, 2, 1, 1],
            mlp_ratios=[2, 2, 2, 2],
            decoder_hidden_size=64,
            drop_path_rate=0.0,
            id2label={at: f"LABEL_{at}" for at in range(1 + TURNS)},
        )
    )
    train(model, images)
    model.segformer.save_pretrained(folder)
    SegformerImageProcessorPil(
        size={"height": SCENE, "width": SCENE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)
    print(f"pretrain: {sum(weight.numel() for weight in model.segformer.parameters()):,} parameters in {folder}")


def train(model: SegformerForSemanticSegmentation, images: np.ndarray) -> None:
    """Train the model to tell turns apart."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    draw, started, hits, seen = np.random.default_rng(SEED), time.perf_counter(), 0, 0
    for step in range(1, STEPS + 1):
        scenes = [turned(images, draw) for _ in range(BATCH)]
        pixels = torch.from_numpy(np.stack([each for each, _ in scenes])).float().div(127.5).sub(1)  # (B, S, S)
        turns = torch.from_numpy(np.stack([each for _, each in scenes])).long()  # (B, S, S); 0: background
        logits = model(pixel_values=pixels[:, None].expand(-1, 3, -1, -1)).logits
        logits = F.interpolate(logits, size=turns.shape[1:], mode="bilinear")
        F.cross_entropy(logits, turns).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        garment = turns > 0
        hits, seen = hits + int((logits.argmax(1) == turns)[garment].sum()), seen + int(garment.sum())
        if step % 100 == 0:
            seconds = time.perf_counter() - started
            print(
                f"pretrain: step {step} of {STEPS}: {hits / seen:.1%} of the garments' pixels, {seconds:.0f} s",
                flush=True,
            )
            hits = seen = 0


def turned(images: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A scene of four garments, each turned, and the turn of each pixel plus one; 0 is the background."""
    turns = draw.integers(0, TURNS, 4)
    chosen = images[draw.integers(0, len(images), 4)]
    return scene(np.stack([np.rot90(each, turn) for each, turn in zip(chosen, turns, strict=True)]), turns + 1, draw)


if __name__ == "__main__":
    main()
