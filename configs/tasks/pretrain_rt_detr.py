"""Pretrain a small RT-DETR on Fashion-MNIST pictures that the recipe does not train on, without labels.

    python configs/tasks/pretrain_rt_detr.py data/fashion-mnist/rest.npz models/rt-detr-garments   # some minutes

The model learns where the garments of a scene are, and how far each has been turned: 0, 90, 180 or 270 degrees
(https://arxiv.org/abs/1803.07728). A folder that exists is left alone.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
from fetch import DARK

from peftcli.demos.pictures import SEED, boxed
from peftcli.demos.pretrain_pictures import fit_rt_detr

TURNS = ("upright", "left", "upside down", "right")


def main() -> None:
    """Train, and save the model."""
    if len(sys.argv) != 3:
        sys.exit("usage: pretrain_rt_detr.py REST.npz FOLDER")
    folder = Path(sys.argv[2])
    if folder.exists():
        print(f"pretrain: {folder} is there already")
        return
    images, draw = np.load(sys.argv[1])["images"], np.random.default_rng(SEED)

    def turned() -> tuple[np.ndarray, list[list[int]], list[int]]:
        """A scene of four garments, each turned, their boxes and turns."""
        turns = draw.integers(0, len(TURNS), 4)
        chosen = images[draw.integers(0, len(images), 4)]
        rotated = [np.rot90(each, turn) for each, turn in zip(chosen, turns, strict=True)]
        image, boxes = boxed(rotated, draw, DARK)
        return image, [*boxes.values()], [int(turns[at]) for at in boxes]

    fit_rt_detr(turned, TURNS, folder, steps=300, batch=16, tell=partial(print, "pretrain:", flush=True))
    print(f"pretrain: ready in {folder}")


if __name__ == "__main__":
    main()
