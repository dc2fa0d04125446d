"""What llama.cpp calls a family of models, and how its weights and settings stand in a .gguf file.

The file holds the checkpoint's tensors under other names. Some are stored otherwise: rows of queries and keys in the
order in which llama.cpp rotates them, norms that count from zero, matrices the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from peftcli.errors import ModelError


@dataclass(frozen=True)
class GgufFamily:
    """How a family stands in a .gguf file."""

    architecture: str
    """llama.cpp's name."""
    permutes: bool = False
    """Whether rows of queries and keys are interleaved: llama.cpp rotates pairs of neighbours there."""
    norms_from_zero: bool = False
    """Whether the checkpoint's norms lack the 1 that the file's have."""
    transposed: tuple[str, ...] = ()
    """Endings of matrices that the checkpoint stores (in, out)."""
    tied: bool = False
    """Whether the family has no head of its own, whatever the config says."""


GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily("llama", permutes=True),
    "mistral": GgufFamily("llama", permutes=True),
    "smollm3": GgufFamily("smollm3", permutes=True),
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3"),
    "gemma": GgufFamily("gemma", norms_from_zero=True, tied=True),
    "gemma2": GgufFamily("gemma2", norms_from_zero=True, tied=True),
    "gemma3_text": GgufFamily("gemma3", norms_from_zero=True, tied=True),
    "phi3": GgufFamily("phi3"),
    "gpt2": GgufFamily(
        "gpt2", transposed=("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    ),
}
"""model_type -> how it stands in a .gguf file."""
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Endings of names that old checkpoints hold, and no model reads."""
_PATTERN = 6
"""Every so many layers of Gemma 3 one sees all tokens: llama.cpp knows no other pattern."""


def gguf_family(model_type: str) -> GgufFamily:
    """Return how a family stands in a .gguf file.

    Raises:
        ModelError: peftcli does not know how.
    """
    if model_type not in GGUF_FAMILIES:
        known = ", ".join(GGUF_FAMILIES)
        raise ModelError(f"{model_type} is no family that peftcli writes as .gguf; it writes {known}", key="base_model")
    return GGUF_FAMILIES[model_type]


def name_map(family: GgufFamily, layers: int) -> Any:
    """Return gguf's map from names of a checkpoint's tensors to those of the file: see ``gguf_name``."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[family.architecture], layers)


def gguf_name(names: Any, name: str) -> str | None:
    """Return the name of a checkpoint's tensor in the file; None for one that the file does not hold.

    Raises:
        ModelError: the family has no such tensor in llama.cpp.
    """
    if name.endswith(_BUFFERS):
        return None
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ModelError(f"llama.cpp has no place for the tensor {name}", key="base_model")
    return found


def row_order(family: GgufFamily, config: Any, name: str) -> torch.Tensor | None:
    """Return the order in which the file has the rows of a projection, given a checkpoint's name; None: as they are.

    llama.cpp rotates rows 2i and 2i + 1 of a head together, transformers rows i and i + half.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", None)}
    kind = next((kind for kind in heads if f".{kind}." in f".{name}."), None)
    if not family.permutes or kind is None:
        return None
    count = heads[kind] or config.num_attention_heads
    return torch.arange(count * _head_size(config)).view(count, 2, -1).transpose(1, 2).flatten()


def as_stored(family: GgufFamily, config: Any, name: str, value: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the checkpoint as the file has it."""
    if family.norms_from_zero and name.endswith("norm.weight"):
        return value.float() + 1
    if name.endswith(family.transposed) and family.transposed:
        return value.T
    order = row_order(family, config, name)
    return value if order is None else value[order]


def write_settings(writer: Any, config: Any) -> None:
    """Give a ``gguf.GGUFWriter`` what llama.cpp must know of a model besides its weights.

    Raises:
        ModelError: llama.cpp computes such a model otherwise.
    """
    _refuse_unlike(config)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if (epsilon := getattr(config, "layer_norm_epsilon", None)) is not None:
        writer.add_layer_norm_eps(epsilon)
        return
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count_kv(config.num_key_value_heads)
    size = _head_size(config)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(int(size * _rope(config).get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    if _rope(config)["rope_type"] == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(_rope(config)["factor"])
    for key, add in {
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "original_max_position_embeddings": writer.add_rope_scaling_orig_ctx_len,
    }.items():
        if value := getattr(config, key, None):
            add(value)
    if window := _window(config):
        writer.add_sliding_window(window)


def more_tensors(config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors that the file has and the checkpoint has not: the factors of Llama 3's rotary frequencies."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return
    half = torch.arange(0, _head_size(config), 2, dtype=torch.float64)
    lengths = 2 * math.pi * rope["rope_theta"] ** (half / _head_size(config))
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    known = rope["original_max_position_embeddings"]
    smooth = ((known / lengths - low) / (high - low)).clamp(0, 1)
    yield "rope_freqs.weight", (1 / ((1 - smooth) / factor + smooth)).float()


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(config: Any) -> Mapping[str, Any]:
    """Return the rotary settings: of a model that has two sets, those of the layers that see all tokens."""
    found = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention", found)


def _window(config: Any) -> int | None:
    """Return the sliding window, of a model that uses it."""
    used = getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if used else None


def _refuse_unlike(config: Any) -> None:
    """Raise ModelError for a setting that llama.cpp computes otherwise, or takes for granted."""
    kind, rope = config.model_type, _rope(config)
    wrong = []
    if rope and rope.get("rope_type") not in ("default", "linear", "llama3"):
        wrong.append(f"rope_type {rope.get('rope_type')}")
    if _window(config) and kind in ("qwen2", "qwen3", "mistral"):
        wrong.append("sliding_window")
    if kind == "smollm3" and getattr(config, "no_rope_layer_interval", 4) != 4:
        wrong.append("no_rope_layer_interval")
    scale, layers = getattr(config, "query_pre_attn_scalar", None), config.num_hidden_layers
    largest = {"gemma2": 46, "gemma3_text": 62}.get(kind)  # whose scale llama.cpp takes from the width
    if scale and layers != largest and scale != _head_size(config):
        wrong.append("query_pre_attn_scalar")
    kinds = list(getattr(config, "layer_types", None) or ())
    pattern = {"gemma2": 2, "gemma3_text": _PATTERN}.get(kind)
    if pattern and kinds != [_KINDS[(at + 1) % pattern == 0] for at in range(layers)]:
        wrong.append("layer_types")
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if local and local.get("rope_theta") != 10000.0:
        wrong.append("rope_theta of the layers with a window")
    if wrong:
        raise ModelError(f"llama.cpp computes {kind} otherwise than this model's {' and '.join(wrong)} says")


_KINDS = {False: "sliding_attention", True: "full_attention"}
