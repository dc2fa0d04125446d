"""Pretrain a small vision transformer on Fashion-MNIST pictures that the recipe does not train on, without labels.

    python configs/tasks/pretrain_vit.py data/fashion-mnist/rest.npz models/vit-fashion   # some minutes on one core

The model learns how far a picture has been turned: 0, 90, 180 or 270 degrees (https://arxiv.org/abs/1803.07728). Its
head is thrown away, so the folder holds an encoder and an image processor. A folder that exists is left alone.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

SEED = 0
EPOCHS = 4
BATCH = 128
LEARNING_RATE = 1e-3
SIDE = 28


def main() -> None:
    """Train, and save the encoder."""
    if len(sys.argv) != 3:
        sys.exit("usage: pretrain_vit.py REST.npz FOLDER")
    folder = Path(sys.argv[2])
    if folder.exists():
        print(f"pretrain: {folder} is there already")
        return
    images = torch.from_numpy(np.load(sys.argv[1])["images"])
    torch.manual_seed(SEED)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=SIDE,
            patch_size=4,
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=192,
            id2label={turn: f"{90 * turn} degrees" for turn in range(4)},
        )
    )
    train(model, images)
    model.vit.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    print(f"pretrain: {sum(weight.numel() for weight in model.vit.parameters()):,} parameters in {folder}")


def train(model: ViTForImageClassification, images: torch.Tensor) -> None:
    """Train the model to tell turns apart."""
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    started, step = time.perf_counter(), 0
    for epoch in range(1, EPOCHS + 1):
        hits = 0
        for chosen in torch.randperm(len(images))[: steps // EPOCHS * BATCH].view(-1, BATCH):
            turns = torch.randint(4, (BATCH,))
            pixels = (
                images[chosen].float().div(127.5).sub(1)
            )  # (B, SIDE, SIDE) in [-1, 1], as the image processor gives
            pixels = torch.stack([torch.rot90(each, int(turn)) for each, turn in zip(pixels, turns, strict=True)])
            logits = model(pixel_values=pixels[:, None].expand(-1, 3, -1, -1)).logits
            F.cross_entropy(logits, turns).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            hits += int((logits.argmax(-1) == turns).sum())
            step += 1
        accuracy = hits / (steps // EPOCHS * BATCH)
        seconds = time.perf_counter() - started
        print(f"pretrain: epoch {epoch} of {EPOCHS}: {accuracy:.1%} of turns told, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
