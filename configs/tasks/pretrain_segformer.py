"""Pretrain a small SegFormer encoder on Fashion-MNIST pictures that the recipe does not train on, without labels.

    python configs/tasks/pretrain_segformer.py data/fashion-mnist/rest.npz models/segformer-garments   # some minutes

The model learns, pixel by pixel, how far each garment of a scene has been turned: 0, 90, 180 or 270 degrees
(https://arxiv.org/abs/1803.07728). Its decode head is thrown away, so the folder holds an encoder and an image
processor. A folder that exists is left alone.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
from fetch import DARK

from peftcli.demos.pictures import SEED, scene
from peftcli.demos.pretrain_pictures import fit_segformer

TURNS = 4


def main() -> None:
    """Train, and save the encoder."""
    if len(sys.argv) != 3:
        sys.exit("usage: pretrain_segformer.py REST.npz FOLDER")
    folder = Path(sys.argv[2])
    if folder.exists():
        print(f"pretrain: {folder} is there already")
        return
    images, draw = np.load(sys.argv[1])["images"], np.random.default_rng(SEED)

    def turned() -> tuple[np.ndarray, np.ndarray]:
        """A scene of four garments, each turned, and the turn of each pixel plus one; 0 is the background."""
        turns = draw.integers(0, TURNS, 4)
        chosen = images[draw.integers(0, len(images), 4)]
        rotated = np.stack([np.rot90(each, turn) for each, turn in zip(chosen, turns, strict=True)])
        return scene(rotated, turns + 1, draw, DARK)

    fit_segformer(turned, TURNS, folder, steps=1500, batch=32, decay=0.05, tell=partial(print, "pretrain:", flush=True))
    print(f"pretrain: ready in {folder}")


if __name__ == "__main__":
    main()
