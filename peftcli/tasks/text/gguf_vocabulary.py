"""A tokenizer as llama.cpp knows it: the vocabulary of a .gguf file, with its special tokens and chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from peftcli.errors import ModelError
from peftcli.tasks.text.stop_tokens import stop_tokens

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's kinds of tokens."""
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    (_LETTERS + r"\p{N}{1,3}" + _REST, "plain"): "llama-bpe",
    (_LETTERS + r"\p{N}" + _REST, "plain"): "qwen2",
    ("digits", "words"): "smollm",
    ("", "words"): "gpt-2",
}
"""How a text is split into words -> llama.cpp's name of it. "words": by GPT-2's own expression."""


def write_vocabulary(writer: Any, tokenizer: Any, rows: int, *, chat: bool) -> None:
    """Give a ``gguf.GGUFWriter`` a tokenizer; ``rows`` is how many tokens the model has rows for.

    Raises:
        ModelError: llama.cpp has no name for how it splits texts, or it is of another kind.
    """
    if not tokenizer.is_fast:
        raise ModelError("has no tokenizer.json, of which a .gguf file's vocabulary is made", key="base_model")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise ModelError(f"has a {model['type']} tokenizer, and peftcli writes BPE as .gguf", key="base_model")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    names, kinds = _tokens(described, rows)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(names, kinds, merges))
        writer.add_add_space_prefix(_adds_blank(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting(described))
        writer.add_token_merges(merges)
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    _write_special(writer, tokenizer, chat=chat)


def _tokens(described: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return the tokens by number, and llama.cpp's kind of each."""
    names = [f"[PAD{number}]" for number in range(rows)]
    kinds = [_UNUSED] * rows
    unknown = described["model"].get("unk_token")
    for name, number in described["model"]["vocab"].items():
        is_byte = len(name) == 6 and name.startswith("<0x") and described["model"].get("byte_fallback")
        if number < rows:
            names[number], kinds[number] = name, _BYTE if is_byte else _UNKNOWN if name == unknown else _NORMAL
    for added in described["added_tokens"]:
        if added["id"] < rows and added["content"] != unknown:
            names[added["id"]] = added["content"]
            kinds[added["id"]] = _CONTROL if added["special"] else _USER
    return names, kinds


def _scores(names: list[str], kinds: list[int], merges: list[str]) -> list[float]:
    """Return scores by which llama.cpp merges in the order of the merges: of each token, the first that makes it."""
    order = dict[str, int]()
    for at, pair in enumerate(merges):
        order.setdefault(pair.replace(" ", "", 1), at)
    last = float(len(merges))
    return [
        -float(order[name]) if name in order else 0.0 if kind != _NORMAL else -last
        for name, kind in zip(names, kinds, strict=True)
    ]


def _splitting(described: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of how texts are split into words."""
    before = described["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    pattern = next((step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"), "")
    digits = any(step["type"] == "Digits" and step["individual_digits"] for step in steps)
    words = any(step["type"] == "ByteLevel" and step.get("use_regex", True) for step in steps)
    known = {"Split", "Digits", "ByteLevel"}
    key = (pattern or "digits" * digits, "words" if words else "plain")
    if key not in _SPLITS or any(step["type"] not in known for step in steps):
        raise ModelError("splits texts in a way for which llama.cpp has no name that peftcli knows", key="base_model")
    return _SPLITS[key]


def _adds_blank(tokenizer: Any) -> bool:
    """Return whether a text's first word is read as if a blank stood before it."""
    return tokenizer.tokenize("a") == tokenizer.tokenize(" a") or tokenizer.tokenize("a")[0].startswith("\u2581")


def _write_special(writer: Any, tokenizer: Any, *, chat: bool) -> None:
    """Write which tokens begin and end texts and answers, and the chat template."""
    framed, ids = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    writer.add_add_bos_token(len(framed) > len(ids) and framed[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(framed) > len(ids) and framed[-1] == tokenizer.eos_token_id)
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ends = list(dict.fromkeys([*own, *sorted(stop_tokens(tokenizer, chat=chat).ids)]))
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": ends[0] if ends else None,
        "eot": ends[1] if len(ends) > 1 else None,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    for name, number in found.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
