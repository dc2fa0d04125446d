"""Small models of pictures that are trained on other characters and signs than those of the demos.

The ResNet learns which character a picture shows, the SegFormer which sign is where. Their heads are thrown away, so
the folders hold encoders. The RT-DETR finds boxes of signs, and is saved whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessorPil,
    RTDetrResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
    ViTImageProcessorPil,
)

from peftcli.demos.pictures import FONTS, OTHER_CHARACTERS, SCENE, SEED, SIDE, SIGNS, SUITS, boxed, picture, scene, sign
from peftcli.demos.pretrain import fit

_LARGER = 2
"""How many times as large as it is a picture of a letter is shown to the ResNet, which begins with large steps."""


def resnet(scratch: Path, folder: Path) -> None:
    """Train a ResNet to tell other characters apart, and save its encoder with an image processor."""
    torch.manual_seed(SEED)
    draw = np.random.default_rng(SEED)
    characters = draw.integers(0, len(OTHER_CHARACTERS), 6000)
    pictures = np.stack([picture(OTHER_CHARACTERS[each], str(draw.choice(FONTS)), draw) for each in characters])
    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=16,
            hidden_sizes=[32, 64, 96],
            depths=[1, 1, 1],
            layer_type="basic",
            id2label=dict(enumerate(OTHER_CHARACTERS)),
        )
    )

    def loss() -> torch.Tensor:
        chosen = draw.integers(0, len(pictures), 64)
        shown = F.interpolate(pixels(pictures[chosen]), scale_factor=_LARGER, mode="bilinear")
        return F.cross_entropy(model(pixel_values=shown).logits, torch.from_numpy(characters[chosen]))

    fit(model.parameters(), loss, steps=200, rate=3e-3)
    model.resnet.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": _LARGER * SIDE, "width": _LARGER * SIDE}).save_pretrained(folder)


def segformer(scratch: Path, folder: Path) -> None:
    """Train a SegFormer to find other signs than the demo's, and save its encoder with an image processor."""
    draw = np.random.default_rng(SEED)
    names = [name for name in SIGNS if name not in SUITS]
    values = draw.integers(0, len(names), 2000)
    pictures = np.stack([sign(names[each], draw, SIDE) for each in values])

    def any_scene() -> tuple[np.ndarray, np.ndarray]:
        chosen = draw.integers(0, len(pictures), 4)
        return scene(pictures[chosen], values[chosen] + 1, draw)

    fit_segformer(any_scene, len(names), folder, steps=250, batch=16, rate=4e-3)


def fit_segformer(
    any_scene: Callable[[], tuple[np.ndarray, np.ndarray]],
    kinds: int,
    folder: Path,
    steps: int,
    batch: int,
    rate: float = 2e-3,
    decay: float = 0.01,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Train a small SegFormer on scenes, and save its encoder with an image processor.

    Args:
        any_scene: Draws a picture and its mask, each (64, 64), uint8; 0 of a mask is the background.
        kinds: How many other values a mask can have.
        folder: Where the model is saved.
        steps: Number of steps.
        batch: Scenes per step.
        rate: The largest learning rate.
        decay: Weight decay.
        tell: As in ``fit``.
    """
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
            id2label={at: f"LABEL_{at}" for at in range(1 + kinds)},
        )
    )

    def loss() -> torch.Tensor:
        images, masks = (np.stack(part) for part in zip(*(any_scene() for _ in range(batch)), strict=True))
        logits = model(pixel_values=pixels(images)).logits
        logits = F.interpolate(logits, size=masks.shape[1:], mode="bilinear")
        return F.cross_entropy(logits, torch.from_numpy(masks).long())

    fit(model.parameters(), loss, steps, rate, decay, tell)
    model.segformer.save_pretrained(folder)
    processor = SegformerImageProcessorPil(
        size={"height": SCENE, "width": SCENE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(folder)


def rt_detr(scratch: Path, folder: Path) -> None:
    """Train an RT-DETR to find other signs than the demo's, and save it with an image processor."""
    draw = np.random.default_rng(SEED)
    names = [name for name in SIGNS if name not in SUITS]
    values = draw.integers(0, len(names), 2000)
    pictures = [sign(names[each], draw, SIDE) for each in values]

    def any_scene() -> tuple[np.ndarray, list[list[int]], list[int]]:
        chosen = draw.integers(0, len(pictures), 4)
        image, boxes = boxed([pictures[each] for each in chosen], draw)
        return image, [*boxes.values()], [int(values[chosen[at]]) for at in boxes]

    fit_rt_detr(any_scene, names, folder, steps=300, batch=16)


def fit_rt_detr(
    any_scene: Callable[[], tuple[np.ndarray, list[list[int]], list[int]]],
    names: Sequence[str],
    folder: Path,
    steps: int,
    batch: int,
    side: int = SCENE,
    width: int = 64,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Train a small RT-DETR on scenes, and save it with an image processor.

    Args:
        any_scene: Draws a grey picture (side, side), its boxes [left, top, width, height], and their classes.
        names: Those of the classes.
        folder: Where the model is saved.
        steps: Number of steps.
        batch: Scenes per step.
        side: That of a picture, in pixels.
        width: That of the layers.
        tell: As in ``fit``.
    """
    torch.manual_seed(SEED)
    model = RTDetrForObjectDetection(_rt_detr_config(names, width))

    def loss() -> torch.Tensor:
        images, boxes, kinds = zip(*(any_scene() for _ in range(batch)), strict=True)
        labels = []
        for some, classes in zip(boxes, kinds, strict=True):
            begins, sides = (torch.tensor(some).view(-1, 4) / side).split(2, dim=1)
            labels.append(
                {"boxes": torch.cat([begins + sides / 2, sides], dim=1), "class_labels": torch.tensor(classes)}
            )
        return model(pixel_values=pixels(np.stack(images)), labels=labels).loss

    fit(model.parameters(), loss, steps, 2e-3, tell=tell)
    model.save_pretrained(folder)
    processor = RTDetrImageProcessorPil(
        size={"height": side, "width": side}, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(folder)


def _rt_detr_config(names: Sequence[str], width: int) -> RTDetrConfig:
    sizes = [width // 4, width // 2, 3 * width // 4, width]
    read: dict[str, Any] = {"out_features": ["stage2", "stage3", "stage4"]}
    backbone = RTDetrResNetConfig(
        embedding_size=width // 4, hidden_sizes=sizes, depths=[1, 1, 1, 1], layer_type="basic", **read
    )
    return RTDetrConfig(
        backbone_config=backbone, freeze_backbone_batch_norms=False, encoder_in_channels=sizes[1:], d_model=width,
        encoder_hidden_dim=width, encoder_ffn_dim=2 * width, decoder_in_channels=[width] * 3,
        decoder_ffn_dim=2 * width, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        hidden_expansion=0.5, num_queries=10, num_denoising=0, dropout=0.0, id2label=dict(enumerate(names)),
    )  # fmt: skip


def pixels(images: np.ndarray) -> torch.Tensor:
    """Return grey pictures (B, S, S) as the image processors give them: (B, 3, S, S) in [-1, 1]."""
    return torch.from_numpy(images).float().div(127.5).sub(1)[:, None].expand(-1, 3, -1, -1)
