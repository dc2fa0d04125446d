"""What the documentation's examples find in the folder that they run in.

Examples name real models of the hub. transformers takes a folder of that name first, so a tiny model in a folder
called ``HuggingFaceTB/SmolLM2-135M-Instruct`` stands in for each, and the examples run as they are printed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from docs_pages import ROOT
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from peftcli.train import fresh_process

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]


def tokenizer(*, chat: bool) -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: index for index, token in enumerate(SPECIAL + alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<|im_end|>")
    wrapped.chat_template = CHATML if chat else None
    return wrapped


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=259,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        )
    )


STAND_INS = {"HuggingFaceTB/SmolLM2-135M-Instruct": llama, "google/mt5-small": t5}


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny models."""
    folder = tmp_path_factory.mktemp("stand-ins")
    for name, build in STAND_INS.items():
        torch.manual_seed(0)
        build().save_pretrained(folder / name)
        tokenizer(chat=build is llama).save_pretrained(folder / name)
    return folder


@pytest.fixture
def workspace(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a page's examples: the stand-ins, a little data, and a few rows of the quickstart's."""
    for name in STAND_INS:
        shutil.copytree(stand_ins / name, tmp_path / name)
    for name, count in (("train", 4), ("eval", 2)):
        lines = (ROOT / f"configs/quickstart/{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        for folder in ("data", "configs/quickstart"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / f"{name}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    shutil.copy(tmp_path / "data/eval.jsonl", tmp_path / "data/more.jsonl")
    pairs = [{"prompt": f"translate English to German: {n}", "completion": f"Zahl {n}"} for n in range(8)]
    (tmp_path / "data/pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    for recipe in (ROOT / "configs").glob("*.yaml"):
        text = recipe.read_text(encoding="utf-8")
        (tmp_path / "configs" / recipe.name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QUICKSTART_MODEL", raising=False)
    # a fresh interpreter takes seconds
    monkeypatch.setattr(fresh_process, "verify_run", lambda folder, on_event: None)
    return tmp_path
