"""Make a small model that sees of a chat model: a vision tower pretrained here, and a connector that knows nothing yet.

    python configs/tasks/pretrain_vlm.py models/SmolLM2-135M-Instruct data/fashion-mnist/rest.npz models/vlm-fashion

Takes some minutes on two cores. The tower, a small SigLIP one, learns to tell the ten classes of Fashion-MNIST apart,
by number, on pictures that no recipe trains on; its head is thrown away. The chat model stays as it is, but for a token
that stands for a patch of a picture, and a chat template that writes it. The connector is random: what the tower sees,
in the scale of the chat model's embeddings. So no part of the model knows a word for what it sees: the recipe trains
that. A folder that exists is left alone.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fetch import CLASSES, SEED
from pretrain_vit import BATCH, SIDE, batches
from torch import nn
from torch.nn import functional as F
from transformers import SiglipVisionModel

from peftcli.demos.pretrain import fit
from peftcli.demos.pretrain_pictures import pixels
from peftcli.demos.pretrain_vision import assemble, seen, vision_tower

EPOCHS = 3
LEARNING_RATE = 1e-3


def main() -> None:
    """Train the tower, and save it with the chat model."""
    if len(sys.argv) != 4:
        sys.exit("usage: pretrain_vlm.py CHAT_MODEL REST.npz FOLDER")
    language, pictures, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if folder.exists():
        print(f"pretrain: {folder} is there already")
        return
    images, labels = (np.load(pictures)[name] for name in ("images", "labels"))
    torch.manual_seed(SEED)
    tower = vision_tower(SIDE)
    train(tower, images, torch.from_numpy(labels).long())
    with torch.no_grad():
        model, processor = assemble(language, tower, seen(tower, pixels(images[:1024])))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    sizes = [sum(weight.numel() for weight in part.parameters()) for part in (tower, model)]
    print(f"pretrain: {sizes[0]:,} of {sizes[1]:,} parameters see, in {folder}")


def train(tower: SiglipVisionModel, images: np.ndarray, labels: torch.Tensor) -> None:
    """Train the tower as a classifier of pictures that are mirrored and shifted at random."""
    width = tower.config.hidden_size
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(CLASSES)))
    chosen = batches(len(images))

    def loss() -> torch.Tensor:
        numbers = next(chosen)
        shown = pixels(images[numbers])
        mirrored = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, shown, shown.flip(-1))
        across, down = torch.randint(5, (2,)).tolist()
        shifted = F.pad(mirrored, (2, 2, 2, 2), value=-1)[..., down : down + SIDE, across : across + SIDE]
        return F.cross_entropy(head(seen(tower, shifted).mean(1)), labels[numbers])

    parameters = [*tower.parameters(), *head.parameters()]
    steps = EPOCHS * (len(images) // BATCH)
    fit(parameters, loss, steps, LEARNING_RATE, 0.05, partial(print, "pretrain:", flush=True))


if __name__ == "__main__":
    main()
