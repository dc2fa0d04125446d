"""Base models: of which kind the user's one is, by its config alone, and small open ones for each task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.errors import ModelError, NetworkError
from peftcli.guard.files import read_small
from peftcli.models.find import find_base
from peftcli.schema import BaseModel

ENCODER, DECODER, ENCODER_DECODER = "encoder", "decoder", "encoder-decoder"
VISION, AUDIO, DIFFUSION = "vision model", "speech model", "diffusion pipeline"
SEEING = "vision-language model"
_MAX_CONFIG = 4 << 20
_PACKAGES = 600 << 20
"""Bytes of Python with its packages, on a CPU."""
_STATES = 26
"""Numbers of a layer's width that a token keeps for the backward pass: of attention and a feed-forward of four widths.
Compared with ``check --deep``: docs/init.md."""


@dataclass(frozen=True)
class Proposal:
    """A small open model."""

    name: str
    """Its hub id."""
    license: str
    millions: float
    """Parameters, in millions."""
    layers: int
    width: int
    vocabulary: int = 0
    tasks: tuple[str, ...] = ()
    many_languages: bool = False
    positions: int = 512
    """Tokens that it reads, at most; of pictures and sounds: what one has."""


PICTURE_TOKENS = 1200
"""Tokens of a large picture in the smallest model that is proposed: 17 tiles of 64, and marks between them."""
_TEXT = ("sequence_classification", "token_classification", "question_answering", "reward", "multiple_choice")
_MASKS = (*_TEXT, "masked_lm")
_CHAT = ("causal_lm", "preference")
_SEES = ("image_text_to_text",)
PROPOSALS = (
    Proposal("distilbert/distilroberta-base", "Apache-2.0", 82, 6, 768, 50265, _MASKS),
    Proposal("answerdotai/ModernBERT-base", "Apache-2.0", 149, 22, 768, 50368, _MASKS, positions=8192),
    Proposal("microsoft/deberta-v3-small", "MIT", 141, 6, 768, 128100, _TEXT),
    Proposal("distilbert/distilbert-base-multilingual-cased", "Apache-2.0", 135, 6, 768, 119547, _MASKS, True),
    Proposal("FacebookAI/xlm-roberta-base", "MIT", 278, 12, 768, 250002, _MASKS, True),
    Proposal("sentence-transformers/all-MiniLM-L6-v2", "Apache-2.0", 23, 6, 384, 30522, ("feature_extraction",)),
    Proposal("cross-encoder/ms-marco-MiniLM-L6-v2", "Apache-2.0", 23, 6, 384, 30522, ("reranker",)),
    Proposal("cross-encoder/mmarco-mMiniLMv2-L12-H384-v1", "Apache-2.0", 118, 12, 384, 250002, ("reranker",), True),
    Proposal("BAAI/bge-small-en-v1.5", "MIT", 33, 12, 384, 30522, ("feature_extraction",)),
    Proposal("intfloat/multilingual-e5-small", "MIT", 118, 12, 384, 250037, ("feature_extraction",), True),
    Proposal("HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0", 135, 30, 576, 49152, _CHAT, positions=8192),
    Proposal("HuggingFaceTB/SmolLM2-360M-Instruct", "Apache-2.0", 362, 32, 960, 49152, _CHAT, positions=8192),
    Proposal("Qwen/Qwen2.5-0.5B-Instruct", "Apache-2.0", 494, 24, 896, 151936, _CHAT, True, 32768),
    Proposal("Qwen/Qwen3-0.6B", "Apache-2.0", 596, 28, 1024, 151936, _CHAT, True, 40960),
    Proposal("google/flan-t5-small", "Apache-2.0", 77, 16, 512, 32128, ("seq2seq_lm",)),
    Proposal("google/flan-t5-base", "Apache-2.0", 248, 24, 768, 32128, ("seq2seq_lm",)),
    Proposal("google/mt5-small", "Apache-2.0", 300, 16, 512, 250112, ("seq2seq_lm",), True),
    Proposal("facebook/deit-tiny-patch16-224", "Apache-2.0", 6, 12, 192, 0, ("image_classification",), positions=197),
    Proposal("google/vit-base-patch16-224", "Apache-2.0", 87, 12, 768, 0, ("image_classification",), positions=197),
    Proposal(
        "nvidia/segformer-b0-finetuned-ade-512-512", "NVIDIA, not commercial", 4, 8, 256, 0, ("semantic_segmentation",),
        positions=1500,  # as much memory as its windows of attention take
    ),
    Proposal("hustvl/yolos-tiny", "Apache-2.0", 6, 12, 192, 0, ("object_detection",), positions=1124),
    Proposal("MIT/ast-finetuned-audioset-10-10-0.4593", "BSD-3", 87, 12, 768, 0, ("audio_classification",), True, 1214),
    Proposal("openai/whisper-tiny", "Apache-2.0", 38, 8, 384, 51865, ("speech_recognition",), True, 1500),
    Proposal("openai/whisper-base", "Apache-2.0", 73, 12, 512, 51865, ("speech_recognition",), True, 1500),
    Proposal("openai/whisper-small", "Apache-2.0", 242, 24, 768, 51865, ("speech_recognition",), True, 1500),
    Proposal("HuggingFaceTB/SmolVLM-256M-Instruct", "Apache-2.0", 256, 30, 576, 49280, _SEES, positions=8192),
    Proposal("HuggingFaceTB/SmolVLM-500M-Instruct", "Apache-2.0", 507, 32, 960, 49280, _SEES, positions=8192),
    Proposal("Qwen/Qwen2-VL-2B-Instruct", "Apache-2.0", 2209, 28, 1536, 151936, _SEES, True, 32768),
    Proposal("segmind/tiny-sd", "CreativeML OpenRAIL-M", 530, 16, 640, 0, ("text_to_image",), positions=4096),
    Proposal(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "CreativeML OpenRAIL-M", 1066, 25, 640, 0, ("text_to_image",),
        positions=4096,
    ),
)  # fmt: skip
"""Each task's, the smallest first."""


_CONVOLUTIONS: dict[str, list[str] | str] = {
    "efficientnet": ["expand_conv", "project_conv"],
    "mobilenet_v2": r".*(expand|reduce)_1x1\.convolution",
    "resnet": ["convolution"],
}
"""The ``model_type`` of a model without linear layers -> ``target_modules``: its convolutions that have no groups."""


@dataclass(frozen=True)
class Base:
    """What a base model's config says."""

    name: str
    family: str | None
    """None: it could not be read."""
    architecture: str = ""
    config: Mapping[str, Any] | None = None
    problem: str = ""
    """Why it could not be read."""

    @property
    def positions(self) -> int | None:
        """How many tokens the model can read, as far as its config says."""
        config = self.config or {}
        config = {**config, **(config.get("text_config") or {})} if self.family == SEEING else config
        found = next((config[key] for key in ("max_position_embeddings", "n_positions") if config.get(key)), None)
        return found if isinstance(found, int) and found > 1 else None

    @property
    def convolutions(self) -> list[str] | str | None:
        """Return the layers to adapt of a vision model that is made of convolutions; None for other models."""
        return _CONVOLUTIONS.get(str((self.config or {}).get("model_type")))

    @property
    def knows_languages(self) -> bool:
        """Whether a speech model knows several languages, and must be told which."""
        size = (self.config or {}).get("vocab_size", 0)
        return self.family == AUDIO and isinstance(size, int) and size > 51864  # English-only ones have a token less

    def as_proposal(self) -> Proposal | None:
        """The model's sizes, as far as its config says them."""
        config = self.config or {}
        config = {**config, **(config.get("text_config") or {})}
        width = _size(config, "hidden_size", "d_model", "n_embd", "dim")
        layers = _size(config, "num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers")
        if not width or not layers:
            return None
        vocabulary = _size(config, "vocab_size")
        layers += _size(config, "decoder_layers", "num_decoder_layers")
        inner = _size(config, "intermediate_size", "d_ff", "encoder_ffn_dim", "n_inner") or 4 * width
        gated = 3 if "silu" in str(config.get("hidden_act")) or config.get("is_gated_act") else 2
        heads, groups = _size(config, "num_attention_heads") or 1, _size(config, "num_key_value_heads")
        attention = (2 + 2 * (groups / heads if groups else 1)) * width * width
        crossed = 1.5 if self.family in (ENCODER_DECODER, AUDIO) else 1
        parameters = layers * (crossed * attention + gated * width * inner)
        tied = config.get("tie_word_embeddings", True) is not False or self.family == ENCODER
        parameters += vocabulary * width * (1 if tied else 2)
        positions = _pictures(config) if self.family == VISION else self.positions or 8192
        return Proposal(self.name, "", parameters / 1e6, layers, width, vocabulary, positions=positions)


def _pictures(config: Mapping[str, Any]) -> int:
    side, patch = config.get("image_size", 224), config.get("patch_size", 16)
    side = side[0] if isinstance(side, list) else side
    patch = patch[0] if isinstance(patch, list) else patch
    return (int(side) // max(1, int(patch))) ** 2 + 1 if isinstance(side, int) and isinstance(patch, int) else 197


def _size(config: Mapping[str, Any], *names: str) -> int:
    return next((config[name] for name in names if isinstance(config.get(name), int)), 0)


def read_base(name: str) -> Base:
    """Read a base model's config: of a folder, or the hub's or the cache's.

    Raises:
        ModelError: there is no such model.
        HubError: the hub has no such model, or refuses it.
    """
    if name.endswith(".gguf"):
        find_base(BaseModel(name=name))
        return Base(name, DECODER, "gguf")
    try:
        found = find_base(BaseModel(name=name))
    except NetworkError as error:
        return Base(name, None, problem=error.message)
    if found.is_pipeline:
        return Base(name, DIFFUSION, "DiffusionPipeline")
    config = _read_config(found.folder / "config.json")
    architecture = next(iter(config.get("architectures") or ()), "")
    return Base(name, _family(config, str(architecture)), str(architecture), config)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_small(path, _MAX_CONFIG))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot be read: {error}", file=str(path), key="base_model") from error
    return found


def _family(config: Mapping[str, Any], architecture: str) -> str | None:
    """The kind of model, by the ending of its class's name and its config's keys."""
    kind = str(config.get("model_type", ""))
    if config.get("vision_config") and architecture.endswith(_WRITERS):
        return SEEING
    if any(key in config for key in _SOUND_KEYS) or kind.startswith(_SOUNDS):
        return AUDIO
    is_picture = any(key in config for key in _PICTURE_KEYS) or kind.startswith(_PICTURES)
    if is_picture and "vocab_size" not in config and not config.get("text_config"):
        return VISION
    if config.get("is_encoder_decoder"):
        return ENCODER_DECODER
    if architecture.endswith(_WRITERS):
        return DECODER
    return DECODER if "num_key_value_heads" in config and not architecture.endswith(_ENCODERS) else ENCODER


_SOUND_KEYS = ("num_mel_bins", "feat_extract_norm", "conv_kernel_sizes")
_PICTURE_KEYS = ("num_channels", "image_size", "patch_size")
_SOUNDS = ("whisper", "wav2vec2", "hubert", "speech", "wavlm", "moonshine", "unispeech", "data2vec-audio", "sew")
_PICTURES = (
    *("vit", "deit", "beit", "swin", "convnext", "resnet", "regnet", "efficientnet", "mobile", "segformer", "dinov"),
    *("dpt", "upernet", "mask", "poolformer", "levit", "cvt", "van", "focalnet", "bit", "data2vec-vision", "timm"),
    *("pvt", "hiera"),
)
"""Beginnings of the ``model_type`` of models for sounds and for pictures, whose config may say no more."""
_WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_ENCODERS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def propose(task: str, *, many_languages: bool) -> list[Proposal]:
    """Return small open models for a task, the one to begin with first."""
    found = [each for each in PROPOSALS if task in each.tasks]
    known = [each for each in found if each.many_languages] if many_languages else found
    return known or found


def memory_of(model: Proposal, rows: int, tokens: int, *, on_gpu: bool) -> int:
    """Estimate the bytes of a run: weights, what a batch of ``rows`` keeps, the output layer's scores, packages."""
    size, each = (2 if on_gpu else 4), min(tokens, model.positions)
    weights = model.millions * 1e6 * size
    states = rows * each * model.layers * model.width * _STATES * 2
    attention = 0 if on_gpu else rows * each * each * model.layers * 4
    writes = bool(model.vocabulary) and bool({*model.tasks} & {*_CHAT, *_SEES, "seq2seq_lm", "speech_recognition"})
    scores = rows * min(each, 448 if "speech_recognition" in model.tasks else each) * model.vocabulary * 4 * writes
    return int(weights + states + attention + scores + (0 if on_gpu else _PACKAGES))
