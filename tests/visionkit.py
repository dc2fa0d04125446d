"""What the tests of image_text_to_text share: tiny vision-language models on disk, rows with pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tokenizers.processors import TemplateProcessing
from trainkit import scratch, tokenizer
from transformers.models.smolvlm import processing_smolvlm

processing_smolvlm.num2words = processing_smolvlm.num2words or str  # which it reads of videos alone

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


def plain_rows() -> list[dict[str, Any]]:
    """Those of ``picture_rows`` that have pictures, as questions and answers."""
    return [
        {"images": row["images"], "prompt": row["messages"][0]["content"], "completion": row["messages"][1]["content"]}
        for row in picture_rows()
        if row["images"]
    ]


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


_SIDES = {"hidden_size": 32, "intermediate_size": 48}


def _words(*special: str, **named: str) -> Any:
    found = tokenizer()
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *special]})
    found._set_model_specific_special_tokens(named)
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


def _qwen3_vl() -> tuple[Any, Any]:
    words = _words("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    number = words.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "num_heads": 4, "patch_size": 4, "out_hidden_size": 32, "num_position_embeddings": 64}
    config = transformers.Qwen3VLConfig(
        text_config={**_TEXT, "head_dim": 8, "rope_parameters": rope},
        vision_config={**_SIDES, **vision, "deepstack_visual_indexes": [0, 1]},
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )
    size = {"shortest_edge": 64, "longest_edge": 1024}
    pictures = transformers.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size)
    videos = transformers.Qwen3VLVideoProcessor(patch_size=4, merge_size=2)
    template = PARTS.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = transformers.Qwen3VLProcessor(pictures, words, videos, chat_template=template)
    return transformers.Qwen3VLForConditionalGeneration(config), processor


def _gemma3() -> tuple[Any, Any]:
    words = _words("<boi>", "<eoi>", "<img>", boi_token="<boi>", eoi_token="<eoi>", image_token="<img>")
    number = words.convert_tokens_to_ids
    config = transformers.Gemma3Config(
        text_config={
            **_TEXT,
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config={"image_size": 16, "patch_size": 4, **_VISION},
        mm_tokens_per_image=4,
        image_token_index=number("<img>"),
        boi_token_index=number("<boi>"),
        eoi_token_index=number("<eoi>"),
    )
    pictures = transformers.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    template = PARTS.replace("<image>", "<boi>")
    processor = transformers.Gemma3Processor(pictures, words, chat_template=template, image_seq_length=4)
    return transformers.Gemma3ForConditionalGeneration(config), processor


def _internvl() -> tuple[Any, Any]:
    special = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    words = _words(*special, **dict(zip(names, special, strict=True)))
    config = transformers.InternVLConfig(
        text_config={**_TEXT, "model_type": "qwen2"},
        vision_config={"image_size": [16, 16], "patch_size": [4, 4], **_VISION},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    size = {"height": 16, "width": 16}
    pictures = transformers.GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, max_patches=4)
    template = PARTS.replace("<image>", "<IMG_CONTEXT>\n")
    videos = transformers.InternVLVideoProcessor(size=size)
    processor = transformers.InternVLProcessor(pictures, words, videos, image_seq_length=4, chat_template=template)
    return transformers.InternVLForConditionalGeneration(config), processor


def _pixtral(name: str, merge: int) -> tuple[Any, Any]:
    words = _words("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = getattr(transformers, f"{name}Config")(
        text_config={**_TEXT, "model_type": "mistral", "head_dim": 8},
        vision_config={"model_type": "pixtral", "image_size": 32, "patch_size": 4, "head_dim": 8, **_VISION},
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        **({"spatial_merge_size": merge} if merge > 1 else {"vision_feature_select_strategy": "full"}),
    )
    pictures = transformers.PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size={"height": 4, "width": 4})
    template = PARTS.replace("<image>", "[IMG]")
    options = {"patch_size": 4, "spatial_merge_size": merge, "chat_template": template}
    processor = transformers.PixtralProcessor(pictures, words, **options)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def _llama4() -> tuple[Any, Any]:
    names = ("image", "image_start", "image_end", "patch", "tile_x_separator", "tile_y_separator")
    words = _words(*(f"<|{name}|>" for name in names))
    number = words.convert_tokens_to_ids
    text = {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "interleave_moe_layer_step": 2}
    vision = {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32, "image_size": 16}
    config = transformers.Llama4Config(
        text_config={**_TEXT, **text, "attention_chunk_size": 128},
        vision_config={**_VISION, **vision, "patch_size": 4, "intermediate_size": 128},
        boi_token_index=number("<|image_start|>"),
        eoi_token_index=number("<|image_end|>"),
        image_token_index=number("<|patch|>"),
    )
    pictures = transformers.Llama4ImageProcessor(size={"height": 16, "width": 16}, max_patches=4)
    template = PARTS.replace("<image>", "<|image|>")
    processor = transformers.Llama4Processor(pictures, words, patch_size=4, chat_template=template)
    return transformers.Llama4ForConditionalGeneration(config), processor


def _smolvlm() -> tuple[Any, Any]:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    words = _words("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<video>", *tiles)
    words.image_token = "<image>"
    config = transformers.SmolVLMConfig(
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        text_config={**_TEXT, "model_type": "llama"},
        vision_config={"image_size": 16, "patch_size": 4, **_VISION},
    )
    edges = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    pictures = transformers.SmolVLMImageProcessorPil(**edges)
    videos = transformers.SmolVLMVideoProcessor(**edges)
    processor = transformers.SmolVLMProcessor(pictures, words, videos, image_seq_len=4, chat_template=PARTS)
    return transformers.SmolVLMForConditionalGeneration(config), processor


def _paligemma() -> tuple[Any, Any]:
    words = _words("<image>", "<bos>")
    words.bos_token, words.chat_template = "<bos>", None
    pictures = transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16})
    pictures.image_seq_length = 4
    processor = transformers.PaliGemmaProcessor(pictures, words)  # which adds tokens of places
    config = transformers.PaliGemmaConfig(
        text_config={**_TEXT, "vocab_size": len(words), "model_type": "gemma", "head_dim": 8},
        vision_config={"image_size": 16, "patch_size": 8, "vision_use_head": False, **_VISION},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=False,
    )
    return transformers.PaliGemmaForConditionalGeneration(config), processor


def _plain_llava() -> tuple[Any, Any]:
    """A LLaVA without a chat template, whose tokenizer adds a token of its own."""
    processor = transformers.AutoProcessor.from_pretrained(llava_base())
    words = processor.tokenizer
    first = [("<|im_start|>", words.convert_tokens_to_ids("<|im_start|>"))]
    words.bos_token = "<|im_start|>"
    words.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", "<|im_start|> $A $B", first)
    processor.chat_template = words.chat_template = None
    return transformers.AutoModelForImageTextToText.from_pretrained(llava_base()), processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "idefics3": _idefics3,
    "llava_next": _llava_next,
    "qwen2_vl": functools.partial(_qwen_vl, "Qwen2VL"),
    "qwen2_5_vl": functools.partial(_qwen_vl, "Qwen2_5_VL"),
    "qwen3_vl": _qwen3_vl,
    "gemma3": _gemma3,
    "internvl": _internvl,
    "mistral3": functools.partial(_pixtral, "Mistral3", merge=2),
    "pixtral": functools.partial(_pixtral, "Llava", merge=1),
    "llama4": _llama4,
    "smolvlm": _smolvlm,
    "paligemma": _paligemma,
    "llava_plain": _plain_llava,
}
"""Families -> a tiny model and its processor."""


PLAIN = ("paligemma", "llava_plain")
"""Families without a chat template."""
CHATS = ("llava", *(name for name in FAMILIES if name not in PLAIN))
"""Those that answer conversations."""
_TORCHVISION = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "mistral3", "pixtral", "llama4", "smolvlm")
"""Families whose processors need it, most of them for videos."""


def family_base(name: str) -> Path:
    """The folder of a tiny model of a family."""
    folder = scratch() / name
    if name in _TORCHVISION:
        pytest.importorskip("torchvision")
    if name == "llava":
        return llava_base()
    if not folder.exists():
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            for part in FAMILIES[name]():
                part.save_pretrained(folder)
    return folder
