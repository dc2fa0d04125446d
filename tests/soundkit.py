"""What the tests of speech recognition share: tiny Whisper models on disk, clips of tones, open tasks."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from tokenizers import pre_tokenizers
from trainkit import scratch

from peftcli.data.store import Outcome
from peftcli.errors import DataError
from peftcli.models.open import open_base
from peftcli.schema import BaseModel
from peftcli.tasks import TASKS

RATE = 16000
SECONDS = 2
"""What the tiny models hear at once."""
POSITIONS = 40
"""What they can say."""
LANGUAGES = ("en", "zh", "de")
TONES = {"low": 220.0, "high": 1760.0, "low high": (220.0, 1760.0), "high low": (1760.0, 220.0)}
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def whisper_tokenizer() -> transformers.WhisperTokenizer:
    """Whisper's own kind, of single bytes."""
    found = transformers.WhisperTokenizer(
        vocab={each: number for number, each in enumerate([*_BYTES, "<|endoftext|>"])},  # special tokens are last
        merges=[],
        pad_token="<|endoftext|>",
    )
    names = ["startoftranscript", *LANGUAGES, "translate", "transcribe", "startoflm", "startofprev", "nospeech"]
    found.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in [*names, "notimestamps"]]})
    found.add_tokens([f"<|{at * 0.02:.2f}|>" for at in range(SECONDS * 50 + 1)])
    return found


@functools.cache
def whisper_base(kind: str = "several") -> Path:
    """A tiny Whisper, as a folder.

    Args:
        kind: ``several`` languages; ``english`` alone; ``old``: its generation config names no tokens and forces some;
            ``masked``: with SpecAugment and dropout.
    """
    folder = scratch() / f"whisper-{kind}"
    tokenizer = whisper_tokenizer()
    known = tokenizer.get_vocab()
    end, start = known["<|endoftext|>"], known["<|startoftranscript|>"]
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=16,
        max_source_positions=50 * SECONDS,
        max_target_positions=POSITIONS,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        apply_spec_augment=kind == "masked",
        dropout=0.1 if kind == "masked" else 0.0,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(1)  # of the first few, one whose answers are not empty
        model = transformers.WhisperForConditionalGeneration(config)
    settings: dict[str, Any] = {"max_length": 12, "decoder_start_token_id": start, "pad_token_id": end}
    settings |= {"eos_token_id": end, "bos_token_id": end}
    if kind == "old":
        settings["forced_decoder_ids"] = [[1, known["<|zh|>"]], [2, known["<|translate|>"]]]
    else:
        settings |= {"is_multilingual": kind != "english", "no_timestamps_token_id": known["<|notimestamps|>"]}
    if kind in ("several", "masked"):
        settings["lang_to_id"] = {f"<|{name}|>": known[f"<|{name}|>"] for name in LANGUAGES}
        settings["task_to_id"] = {name: known[f"<|{name}|>"] for name in ("translate", "transcribe")}
    model.generation_config = transformers.GenerationConfig(**settings)
    model.save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=SECONDS)
    transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


def tone(pitch: float | Sequence[float] = 440.0, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    """Samples of one tone, or of several one after another."""
    pitches = [pitch] if isinstance(pitch, float) else list(pitch)
    time = np.arange(int(seconds * rate / len(pitches))) / rate
    return np.concatenate([0.5 * np.sin(2 * np.pi * each * time) for each in pitches]).astype(np.float32)


def clip(path: Path, samples: np.ndarray, rate: int = RATE, **options: Any) -> str:
    """A sound file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **options)
    return str(path)


@functools.cache
def tone_rows() -> tuple[dict[str, Any], ...]:
    """Clips of tones, and what they are called."""
    return tuple(
        {"audio": clip(scratch() / f"tones/{number}-{name}.wav", tone(pitch, 0.5 + number / 10)), "text": name}
        for number in range(3)
        for name, pitch in TONES.items()
    )


def speech_task(kind: str = "several", **settings: Any) -> Any:
    """The task over a tiny Whisper."""
    row = TASKS["speech_recognition"]
    if kind != "english":
        settings.setdefault("language", "en")
    return row.open(row.settings(**settings), open_base(BaseModel(name=str(whisper_base(kind)))))


def outcomes(task: Any, values: Sequence[Mapping[str, Any]], **options: Any) -> list[Outcome | DataError]:
    """What becomes of rows."""
    from classifierkit import table_of

    table, rows = table_of(values, **options)
    return task.encode(rows, task.read(table))


@functools.cache
def hearing_base(kind: str) -> Path:
    """A tiny model without a head that hears, with its feature extractor, as a folder.

    Args:
        kind: ``wav2vec2``, or ``wav2vec2-group`` with its norm over time; ``hubert``; ``ast``; ``w2v-bert``.
    """
    folder = scratch() / f"hearing-{kind}"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    still = {"hidden_dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
    convolutions = {"conv_dim": (16, 16), "conv_kernel": (80, 8), "conv_stride": (40, 8), "num_feat_extract_layers": 2}
    convolutions |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16}
    options = {**sizes, **still, **convolutions, "feat_proj_dropout": 0.0, "final_dropout": 0.0}
    options["apply_spec_augment"] = False
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        if kind == "ast":
            quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            config = transformers.ASTConfig(**sizes, **quiet, max_length=64, num_mel_bins=32, patch_size=16)
            model: Any = transformers.ASTModel(config)
            extractor: Any = transformers.ASTFeatureExtractor(max_length=64, num_mel_bins=32)
        elif kind == "w2v-bert":
            model = transformers.Wav2Vec2BertModel(
                transformers.Wav2Vec2BertConfig(
                    **sizes,
                    **still,
                    feature_projection_input_dim=160,
                    apply_spec_augment=False,
                    conformer_conv_dropout=0.0,
                    feat_proj_dropout=0.0,
                    final_dropout=0.0,
                )
            )
            extractor = transformers.SeamlessM4TFeatureExtractor()
        else:
            norm = "group" if kind == "wav2vec2-group" else "layer"
            name = "Hubert" if kind == "hubert" else "Wav2Vec2"
            config = getattr(transformers, f"{name}Config")(**options, feat_extract_norm=norm)
            model = getattr(transformers, f"{name}Model")(config)
            extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer")
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


@functools.cache
def moonshine_base() -> Path:
    """A tiny model of another kind, that hears samples and any length of them, as a folder."""
    from trainkit import tokenizer

    folder, words = scratch() / "moonshine", tokenizer(chat=False)
    config = transformers.MoonshineConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        decoder_start_token_id=1,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = transformers.MoonshineForConditionalGeneration(config)
    model.generation_config.max_length = 12
    model.save_pretrained(folder)
    transformers.Wav2Vec2Processor(transformers.Wav2Vec2FeatureExtractor(), words).save_pretrained(folder)
    return folder
