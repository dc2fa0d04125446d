"""Tiny base models, built from configs: every shape of model that the adapter core must know."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

VOCABULARY, PAD, BOS, EOS = 96, 0, 1, 95
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""What models call their cache: another name since transformers 5.24 or so."""

_IDS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **_IDS,
}


def _llama(tied: bool) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_DECODER, tie_word_embeddings=tied))


def _gpt2() -> PreTrainedModel:
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, **rates, **_IDS)
    )


def _opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=16,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            dropout=0.0,
            do_layer_norm_before=False,
            **_IDS,
        )
    )


def _gemma3() -> PreTrainedModel:
    return Gemma3ForCausalLM(Gemma3TextConfig(**_DECODER, head_dim=8, sliding_window=16))


def gemma3_towers(vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """Gemma 3 in its usual form: a tower that sees beside the decoder, whose masks are made above it."""
    kinds = ["sliding_attention", "full_attention"]
    text = {**_DECODER, "vocab_size": vocabulary, "head_dim": 8, "sliding_window": 16, "layer_types": kinds}
    sight = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config={**sight, "image_size": 32, "patch_size": 8},
            image_token_index=vocabulary - 2,
            mm_tokens_per_image=4,
            **_IDS,
        )
    )


def _bloom() -> PreTrainedModel:
    return BloomForCausalLM(
        BloomConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            n_layer=2,
            n_head=4,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            **_IDS,
        )
    )


def _t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=PAD,
            eos_token_id=EOS,
            decoder_start_token_id=PAD,
        )
    )


def _bert() -> PreTrainedModel:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=3,
            pad_token_id=PAD,
        )
    )


def _whisper() -> PreTrainedModel:
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=VOCABULARY,
            num_mel_bins=8,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_source_positions=16,
            max_target_positions=64,
            dropout=0.0,
            decoder_start_token_id=BOS,
            begin_suppress_tokens=None,
            **_IDS,
        )
    )


def _convnet() -> PreTrainedModel:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=8)
    )


_BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: _llama(tied=False),
    "llama_tied": lambda: _llama(tied=True),
    "gpt2": _gpt2,
    "opt": _opt,
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_DECODER)),
    "gemma3": _gemma3,
    "gemma3_towers": gemma3_towers,
    "bloom": _bloom,
    "t5": _t5,
    "bert": _bert,
    "whisper": _whisper,
    "convnet": _convnet,
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.0)
    ),
}

OTHER_KINDS = ("whisper", "convnet", "mixtral", "gemma3_towers")
"""One that hears, one that sees, one with experts whose weights are fused, one that sees and reads."""
KINDS = tuple(name for name in _BUILDERS if name not in OTHER_KINDS)
"""Models that read token ids, one of each shape."""
DECODERS = ("llama", "llama_tied", "gpt2", "opt", "qwen2", "gemma3", "bloom")


def checkpoint_activations(model: Any, *, reentrant: bool = False) -> None:
    """Let a model compute its activations again in the backward pass."""
    enable = "activation_checkpointing_enable"  # its name since transformers 5.24 or so
    getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")({"use_reentrant": reentrant})


def tiny(kind: str, seed: int = 0, scale: float = 3.0) -> PreTrainedModel:
    """A tiny base model in eval mode; its weights depend on the arguments only.

    Weights are ``scale`` times as large as transformers starts them, so that the logits of different inputs differ
    by far more than rounding.
    """
    place = torch.get_default_device(), torch.get_default_dtype()
    return copy.deepcopy(_tiny(kind, seed, scale, *place))  # which takes half the time of another


@functools.cache
def _tiny(kind: str, seed: int, scale: float, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    del device, dtype  # they are what the model is built on and of
    with torch.inference_mode(False), torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = _BUILDERS[kind]().eval()
    with torch.inference_mode(False), torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids, none of them special."""
    return torch.randint(BOS + 1, EOS, shape, generator=torch.Generator().manual_seed(seed))


def batch(kind: str, seed: int = 0, rows: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    """Inputs without padding; an encoder-decoder's hold what the decoder reads too."""
    if kind in ("whisper", "convnet"):
        generator = torch.Generator().manual_seed(seed)
        if kind == "convnet":
            return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
        sound = torch.randn(rows, 8, 32, generator=generator)
        return {"input_features": sound, "decoder_input_ids": ids(rows, 5, seed=seed + 1)}
    inputs = {"input_ids": ids(rows, length, seed=seed), "attention_mask": torch.ones(rows, length, dtype=torch.long)}
    if kind == "t5":
        inputs["decoder_input_ids"] = ids(rows, 5, seed=seed + 1)
    return inputs


def labelled(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The inputs of ``batch`` with labels."""
    inputs = batch(kind, seed)
    inputs.pop("decoder_input_ids", None)
    classes, tokens = torch.tensor([0, 2]), ids(2, 5, seed=seed + 1)
    labels = {"bert": classes, "convnet": classes, "t5": tokens, "whisper": tokens}
    return {**inputs, "labels": labels[kind] if kind in labels else inputs["input_ids"]}


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Give every trainable weight a value that matters, in the order of the names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, no dropout."""
    before = model.training
    yield model.eval()
    model.train(before)


class Gated(nn.Module):
    """Multiplies with a parameter of its own what a module inside it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self.inner(x), self.gate)
