"""A small model that sees: a vision tower that is trained on other characters than the demo's, before a chat model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
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

from peftcli.demos import smollm2
from peftcli.demos.pictures import FONTS, OTHER_CHARACTERS, SEED, SIDE, picture
from peftcli.demos.pretrain import fit
from peftcli.demos.pretrain_pictures import pixels

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


def llava(wheel: Path, scratch: Path, folder: Path) -> None:
    """Train a tower to tell other characters apart, and save it with SmolLM2 and a random connector.

    Raises:
        StorageError: the wheel is not the one that was tested.
    """
    torch.manual_seed(SEED)
    draw = np.random.default_rng(SEED)
    characters = draw.integers(0, len(OTHER_CHARACTERS), 6000)
    pictures = np.stack([picture(OTHER_CHARACTERS[each], str(draw.choice(FONTS)), draw) for each in characters])
    tower = vision_tower(SIDE)
    head = nn.Linear(tower.config.hidden_size, len(OTHER_CHARACTERS))

    def loss() -> torch.Tensor:
        chosen = draw.integers(0, len(pictures), 64)
        logits = head(seen(tower, pixels(pictures[chosen])).mean(1))
        return F.cross_entropy(logits, torch.from_numpy(characters[chosen]))

    fit([*tower.parameters(), *head.parameters()], loss, steps=600, rate=1e-3)
    chat = scratch / "chat"
    chat.mkdir()
    smollm2.make(wheel, scratch, chat)
    with torch.no_grad():
        model, processor = assemble(str(chat), tower, seen(tower, pixels(pictures[:1024])))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def vision_tower(side: int) -> SiglipVisionModel:
    """A SigLIP tower of 0.7 million parameters without values, for pictures of some pixels a side."""
    return SiglipVisionModel(
        SiglipVisionConfig(
            image_size=side,
            patch_size=7,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=384,
            vision_use_head=False,
        )
    )


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
        SiglipImageProcessorPil(size={"height": tower.config.image_size, "width": tower.config.image_size}),
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )
    return model, processor
