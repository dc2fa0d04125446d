"""Pretrain a small vision transformer on Fashion-MNIST pictures that the recipe does not train on, without labels.

    python configs/tasks/pretrain_vit.py data/fashion-mnist/rest.npz models/vit-fashion   # some minutes on one core

The model learns how far a picture has been turned: 0, 90, 180 or 270 degrees (https://arxiv.org/abs/1803.07728). Its
head is thrown away, so the folder holds an encoder and an image processor. A folder that exists is left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from peftcli.demos.pretrain import fit

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
    chosen = batches(len(images))

    def loss() -> torch.Tensor:
        pixels = images[next(chosen)].float().div(127.5).sub(1)  # (B, S, S) in [-1, 1], as the processor gives them
        turns = torch.randint(4, (BATCH,))
        pixels = torch.stack([torch.rot90(each, int(turn)) for each, turn in zip(pixels, turns, strict=True)])
        logits = model(pixel_values=pixels[:, None].expand(-1, 3, -1, -1)).logits
        return F.cross_entropy(logits, turns)

    fit(
        model.parameters(),
        loss,
        EPOCHS * (len(images) // BATCH),
        LEARNING_RATE,
        0.05,
        partial(print, "pretrain:", flush=True),
    )
    model.vit.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    print(f"pretrain: {sum(weight.numel() for weight in model.vit.parameters()):,} parameters in {folder}")


def batches(count: int) -> Iterator[torch.Tensor]:
    """Draw the numbers of the pictures of each step, each once in an epoch."""
    while True:
        yield from torch.randperm(count)[: count // BATCH * BATCH].view(-1, BATCH)


if __name__ == "__main__":
    main()
