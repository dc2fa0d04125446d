"""Small models of pictures that are trained on other characters than those of the demos.

The vision transformer learns which character a picture shows; the SegFormer, pixel by pixel, how far each is turned: by
0, 90, 180 or 270 degrees (https://arxiv.org/abs/1803.07728). Their heads are thrown away, so the folders hold encoders.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from peftcli.demos.pictures import FONTS, OTHER_CHARACTERS, SCENE, SEED, SIDE, picture, scene
from peftcli.demos.pretrain import fit

_TURNS = 4
_PICTURES = 6000
_STEPS = {"vit": 300, "segformer": 200}
_BATCH = {"vit": 64, "segformer": 16}
_RATE = 2e-3


def vit(scratch: Path, folder: Path) -> None:
    """Train a vision transformer to tell other characters apart, and save its encoder with an image processor."""
    draw, pictures, characters = _drawn()
    model = ViTForImageClassification(
        ViTConfig(
            image_size=SIDE,
            patch_size=4,
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=192,
            id2label=dict(enumerate(OTHER_CHARACTERS)),
        )
    )

    def loss() -> torch.Tensor:
        chosen = draw.integers(0, len(pictures), _BATCH["vit"])
        logits = model(pixel_values=_pixels(pictures[chosen])).logits
        return F.cross_entropy(logits, torch.from_numpy(characters[chosen]))

    fit(model.parameters(), loss, _STEPS["vit"], _RATE)
    model.vit.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def segformer(scratch: Path, folder: Path) -> None:
    """Train a SegFormer to tell of each pixel how far its letter is turned, and save its encoder likewise."""
    draw, pictures, _ = _drawn()
    model = SegformerForSemanticSegmentation(
        SegformerConfig(
            depths=[1, 1, 1, 1],
            hidden_sizes=[24, 48, 72, 96],
            num_attention_heads=[1, 2, 3, 4],
            sr_ratios=[4, 2, 1, 1],
            mlp_ratios=[2, 2, 2, 2],
            decoder_hidden_size=64,
            drop_path_rate=0.0,
            id2label={at: f"LABEL_{at}" for at in range(1 + _TURNS)},
        )
    )

    def loss() -> torch.Tensor:
        scenes = [_turned_scene(pictures, draw) for _ in range(_BATCH["segformer"])]
        masks = torch.from_numpy(np.stack([mask for _, mask in scenes])).long()  # (B, S, S); 0: background
        logits = model(pixel_values=_pixels(np.stack([image for image, _ in scenes]))).logits
        return F.cross_entropy(F.interpolate(logits, size=masks.shape[1:], mode="bilinear"), masks)

    fit(model.parameters(), loss, _STEPS["segformer"], _RATE)
    model.segformer.save_pretrained(folder)
    processor = SegformerImageProcessorPil(
        size={"height": SCENE, "width": SCENE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(folder)


def _drawn() -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    """Pictures of characters that no demo trains on, (N, 28, 28), and which character each shows, (N,)."""
    torch.manual_seed(SEED)
    draw = np.random.default_rng(SEED)
    characters, fonts = draw.integers(0, len(OTHER_CHARACTERS), _PICTURES), list(FONTS)
    drawn = [picture(OTHER_CHARACTERS[each], str(draw.choice(fonts)), draw) for each in characters]
    return draw, np.stack(drawn), characters


def _pixels(images: np.ndarray) -> torch.Tensor:
    """Grey pictures (B, S, S) as the image processors give them: (B, 3, S, S) in [-1, 1]."""
    return torch.from_numpy(images).float().div(127.5).sub(1)[:, None].expand(-1, 3, -1, -1)


def _turned_scene(pictures: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    turns = draw.integers(0, _TURNS, 4)
    chosen = pictures[draw.integers(0, len(pictures), 4)]
    return scene(np.stack([np.rot90(each, turn) for each, turn in zip(chosen, turns, strict=True)]), turns + 1, draw)
