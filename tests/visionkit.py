"""What the tests of image_text_to_text share: tiny vision-language models on disk, rows with pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
def picture_rows() -> list[dict[str, Any]]:
    """Twelve rows: conversations with a picture, with two, and with none, in the three forms of columns."""
    colours, rows = ("red", "green", "blue"), list[dict[str, Any]]()
    for number in range(12):
        colour = colours[number % 3]
        path = scratch() / f"picture {number}.png"
        Image.new(("RGB", "L", "RGBA")[number % 3], (8 + number, 20), colour).save(path)
        answer = {"role": "assistant", "content": f"It is {colour}."}
        content = ("<image>Which colour?", "<image>Or <image>?", "Which colour?")[number % 3]
        images = [str(path)] * content.count("<image>")
        rows.append({"messages": [{"role": "user", "content": content}, answer], "images": images})
    return rows


_TEXT = {
    "vocab_size": 340,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def _words(*special: str) -> Any:
    found = tokenizer()
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *special]})
    return found


def _idefics3() -> tuple[Any, Any]:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    words = _words("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *tiles)
    words.image_token = "<image>"
    config = transformers.Idefics3Config(
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        text_config=transformers.LlamaConfig(**_TEXT),
        vision_config={"image_size": 16, "patch_size": 4, **_VISION},
    )
    pictures = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = transformers.Idefics3Processor(pictures, words, image_seq_len=4, chat_template=PARTS)
    return transformers.Idefics3ForConditionalGeneration(config), processor


def _llava_next() -> tuple[Any, Any]:
    words, grid = _words("<image>"), [[16, 32], [32, 16], [32, 32]]
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=32, **_VISION),
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
    )
    pictures = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=grid
    )
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = transformers.LlavaNextProcessor(pictures, words, chat_template=PARTS, **options)
    return transformers.LlavaNextForConditionalGeneration(config), processor


def _qwen_vl(name: str) -> tuple[Any, Any]:
    words = _words("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
    vision |= {"embed_dim": 32, "mlp_ratio": 2} if name == "Qwen2VL" else {}
    if name != "Qwen2VL":
        vision |= {"out_hidden_size": 32, "intermediate_size": 48, "window_size": 16, "fullatt_block_indexes": [1]}
    number = words.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = getattr(transformers, f"{name}Config")(
        text_config={**_TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )
    size = {"shortest_edge": 64, "longest_edge": 1024}
    pictures = transformers.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size)
    videos = transformers.Qwen2VLVideoProcessor(patch_size=4, merge_size=2)
    template = PARTS.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = getattr(transformers, f"{name}Processor")(pictures, words, videos, chat_template=template)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "idefics3": _idefics3,
    "llava_next": _llava_next,
    "qwen2_vl": functools.partial(_qwen_vl, "Qwen2VL"),
    "qwen2_5_vl": functools.partial(_qwen_vl, "Qwen2_5_VL"),
}
"""Families -> a tiny model and its processor."""


def family_base(name: str) -> Path:
    """The folder of a tiny model of a family."""
    folder = scratch() / name
    if name == "llava":
        return llava_base()
    if not folder.exists():
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            for part in FAMILIES[name]():
                part.save_pretrained(folder)
    return folder
