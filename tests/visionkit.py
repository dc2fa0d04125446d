"""What the tests of image_text_to_text share: tiny vision-language models on disk, rows with pictures."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import transformers
from PIL import Image
from trainkit import scratch, tokenizer

PARTS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML whose contents are lists of parts alone."""


@functools.cache
def llava_base() -> Path:
    """A tiny LLaVA with its processor, as a folder."""
    folder, words = scratch() / "llava", tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<image>"]})
    words.chat_template = PARTS
    text = transformers.LlamaConfig(
        vocab_size=304,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    sides = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48}
    vision = transformers.CLIPVisionConfig(**sides, num_hidden_layers=2, num_attention_heads=4, projection_dim=32)
    number = words.convert_tokens_to_ids("<image>")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=number)
        transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    square = {"height": 16, "width": 16}
    pictures = transformers.CLIPImageProcessorPil(size=square, crop_size=square)
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    transformers.LlavaProcessor(pictures, words, chat_template=PARTS, **options).save_pretrained(folder)
    return folder


@functools.cache
def picture_rows() -> list[dict]:
    """Twelve rows: conversations with a picture, with two, and with none, in the three forms of columns."""
    colours, rows = ("red", "green", "blue"), []
    for number in range(12):
        colour = colours[number % 3]
        path = scratch() / f"picture {number}.png"
        Image.new(("RGB", "L", "RGBA")[number % 3], (8 + number, 20), colour).save(path)
        answer = {"role": "assistant", "content": f"It is {colour}."}
        content = ("<image>Which colour?", "<image>Or <image>?", "Which colour?")[number % 3]
        images = [str(path)] * content.count("<image>")
        rows.append({"messages": [{"role": "user", "content": content}, answer], "images": images})
    return rows
