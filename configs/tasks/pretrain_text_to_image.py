"""Pretrain a small text-to-image pipeline, shaped as Stable Diffusion, on Fashion-MNIST pictures of all kinds but bags.

    python configs/tasks/pretrain_text_to_image.py data/fashion-mnist/train models/tiny-diffusion   # some minutes

An autoencoder first learns to make 256 numbers of a picture of 32 x 32 pixels; then a UNet and a text encoder learn to
make these numbers of noise and a prompt: "a photo of a dress". A folder that exists is left alone.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from fetch import CLASSES, SEED
from PIL import Image

from peftcli.demos.pretrain_diffusion import SIDE, fit_pipeline

LEFT_OUT = "bag"
WORDS = ["a", "photo", "of", "an", "sks", *sorted({part for name in CLASSES for part in name.split("-")}), "-"]


def main() -> None:
    """Train, and save the pipeline."""
    if len(sys.argv) != 3:
        sys.exit("usage: pretrain_text_to_image.py PICTURES FOLDER")
    folder = Path(sys.argv[2])
    if folder.exists():
        print(f"pretrain: {folder} is there already")
        return
    files = [path for path in sorted(Path(sys.argv[1]).glob("*/*.png")) if path.parent.name != LEFT_OUT]
    pictures = np.stack([np.asarray(Image.open(path).resize((SIDE, SIDE))) for path in files])
    pictures = np.concatenate([pictures, pictures[:, :, ::-1]])  # mirrored, too
    kinds = [path.parent.name for path in files] * 2
    draw = np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory() as scratch:
        pipeline = fit_pipeline(
            pictures,
            kinds,
            WORDS,
            draw,
            Path(scratch),
            (300, 1200),
            (2e-3, 1e-3),
            partial(print, "pretrain:", flush=True),
        )
    pipeline.save_pretrained(folder)
    print(f"pretrain: {sum(weight.numel() for weight in pipeline.unet.parameters()):,} parameters in {folder}")


if __name__ == "__main__":
    main()
