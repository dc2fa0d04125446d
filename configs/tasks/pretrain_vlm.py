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
from typing import Any

import numpy as np
import torch
from fetch import CLASSES, SEED
from pretrain_vit import BATCH, SIDE, batches
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from peftcli.demos.pretrain import fit

EPOCHS = 3
LEARNING_RATE = 1e-3
IMAGE = "<image>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat model's turns, without its system prompt; a picture stands where its part does."""


def main() -> None:
    """Train the tower, and save it with the chat model."""
    if len(sys.argv) != 4:
        sys.exit("usage: pretrain_vlm.py CHAT_MODEL REST.npz FOLDER")
    language, pictures, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if folder.exists():
        print(f"pretrain: {folder} is there already")
        return
    images, labels = (torch.from_numpy(np.load(pictures)[name]) for name in ("images", "labels"))
    torch.manual_seed(SEED)
    tower = SiglipVisionModel(
        SiglipVisionConfig(
            image_size=SIDE,
            patch_size=7,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=384,
            vision_use_head=False,
        )
    )
    train(tower, images, labels.long())
    with torch.no_grad():
        model, processor = assemble(language, tower, seen(tower, pixels_of(images[:1024])))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    sizes = [sum(weight.numel() for weight in part.parameters()) for part in (tower, model)]
    print(f"pretrain: {sizes[0]:,} of {sizes[1]:,} parameters see, in {folder}")


def train(tower: SiglipVisionModel, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Train the tower as a classifier of pictures that are mirrored and shifted at random."""
    width = tower.config.hidden_size
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(CLASSES)))
    chosen = batches(len(images))

    def loss() -> torch.Tensor:
        numbers = next(chosen)
        pixels = pixels_of(images[numbers])
        mirrored = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, pixels, pixels.flip(-1))
        across, down = torch.randint(5, (2,)).tolist()
        shifted = F.pad(mirrored, (2, 2, 2, 2), value=-1)[..., down : down + SIDE, across : across + SIDE]
        return F.cross_entropy(head(seen(tower, shifted).mean(1)), labels[numbers])

    parameters = [*tower.parameters(), *head.parameters()]
    steps = EPOCHS * (len(images) // BATCH)
    fit(parameters, loss, steps, LEARNING_RATE, 0.05, partial(print, "pretrain:", flush=True))


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    """Return pictures (B, S, S) as the processor gives them: three equal channels in [-1, 1]."""
    return images.float().div(127.5).sub(1)[:, None].expand(-1, 3, -1, -1)


def seen(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Return what a connector gets of pictures (B, patches, D)."""
    return tower(pixels, output_hidden_states=True).hidden_states[-1]


def assemble(language: str, tower: Any, features: torch.Tensor) -> tuple[Any, Any]:
    """Put a tower before a chat model, with a random connector; return the model and its processor.

    Args:
        language: The chat model.
        tower: What sees.
        features: What it sees in some pictures (B, patches, D); the connector brings them to the scale of embeddings.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(language)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    chat: Any = AutoModelForCausalLM.from_pretrained(language)
    chat.resize_token_embeddings(len(tokenizer))
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=chat.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=tower.embeddings.num_patches,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        dtype=chat.dtype,
    )
    model: Any = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(chat.model.state_dict())
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    connector: Any = model.model.multi_modal_projector
    means, deviations = features.flatten(0, 1).mean(0), features.flatten(0, 1).std(0)
    connector.linear_1.weight.normal_(0, features.shape[-1] ** -0.5).div_(deviations)
    connector.linear_1.bias.copy_(-connector.linear_1.weight @ means)
    connector.linear_2.weight.normal_(0, connector.linear_2.in_features**-0.5)
    connector.linear_2.weight.mul_(chat.get_input_embeddings().weight.std() / connector(features).std())
    model.generation_config = chat.generation_config
    processor = LlavaProcessor(
        SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )
    return model, processor


if __name__ == "__main__":
    main()
