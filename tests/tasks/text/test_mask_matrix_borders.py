"""The border between prompt and answer, for every kind of tokenizer: a token across it belongs to the answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from examplekit import encode_chat, encode_pair
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from peftcli.tasks.text.chat import IGNORED, Encoded
from peftcli.tasks.text.formats import AlpacaExample, ChatExample, PairExample

LETTERS = "ab eE\u00e9\u0301\u00c5\u030aﬁⅧ\n\u00a0.日"
TEXTS = ["a ab aa b ba", "ea be éa bé", "ab\nab a\n\nb", "  a  b", "e\u0301a ﬁ Ⅷ Å", "日a 日 b", "E Ea"] * 8
ALPHABET = sorted({*LETTERS, *"▁ \u0301"} | {letter for text in TEXTS for letter in text})


def bpe(texts: list[str], normalizer: Any = None, splitter: Any = None, alphabet: list[str] | None = None) -> Tokenizer:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    options = {"initial_alphabet": alphabet or ALPHABET, "special_tokens": ["<unk>", "<s>", "</s>"]}
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, show_progress=False, **options))
    return backend


def unigram(normalizer: Any = None) -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizers.Metaspace(prepend_scheme="always")
    options = {"initial_alphabet": ALPHABET, "special_tokens": ["<unk>", "<s>", "</s>"], "unk_token": "<unk>"}
    backend.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=90, show_progress=False, **options))
    return backend


def word_piece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    options = {"initial_alphabet": ALPHABET, "special_tokens": ["<unk>", "<s>", "</s>"]}
    backend.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, show_progress=False, **options))
    return backend


STRIP = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
LLAMA = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
BYTES = {"splitter": pre_tokenizers.ByteLevel(add_prefix_space=False), "alphabet": pre_tokenizers.ByteLevel.alphabet()}
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": lambda: bpe(TEXTS, **BYTES),
    "byte-level, NFC": lambda: bpe(TEXTS, normalizers.NFC(), **BYTES),
    "byte-level, prefix space": lambda: bpe(
        TEXTS, splitter=pre_tokenizers.ByteLevel(), alphabet=pre_tokenizers.ByteLevel.alphabet()
    ),
    "Metaspace, always": lambda: bpe(TEXTS, splitter=pre_tokenizers.Metaspace(prepend_scheme="always")),
    "Metaspace, never": lambda: bpe(TEXTS, splitter=pre_tokenizers.Metaspace(prepend_scheme="never")),
    "Llama": lambda: bpe(TEXTS, LLAMA),
    "Unigram": unigram,
    "Unigram, NFKC": lambda: unigram(normalizers.NFKC()),
    "Unigram, no accents": lambda: unigram(STRIP),
    "WordPiece, lower case": word_piece,
}


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = (
        "{% for m in messages %}{{ '<s>' if m.role == 'assistant' else '' }}{{ m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>' }}{% endif %}"
    )
    return made


def prepared(backend: Tokenizer, text: str) -> str:
    """What the tokens of ``text`` spell."""
    text = backend.normalizer.normalize_str(text) if backend.normalizer else text
    return (
        "".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)) if backend.pre_tokenizer else text
    )


def untrained(encoded: Encoded) -> int:
    """How many tokens stand before the trained ones, which all stand at the end."""
    labels = encoded.labels
    count = next((at for at, label in enumerate(labels) if label != IGNORED), len(labels))
    assert labels == [IGNORED] * count + encoded.input_ids[count:]
    return count


WORDS = st.text(st.sampled_from(LETTERS), max_size=5)


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(prompt=WORDS, completion=WORDS)
@example(prompt="e", completion="\u0301a")
@example(prompt="a\n", completion="\n\nb")
@example(prompt="a ", completion="b")
@example(prompt="", completion="ab")
@example(prompt="e", completion="\u0301")
def test_only_tokens_of_the_prompt_alone_are_untrained(kind: str, prompt: str, completion: str) -> None:
    """The tokens tell so by what they spell: not by the offsets, which the code goes by."""
    made = tokenizer(kind)
    encoded = encode_pair(PairExample(prompt, completion), made)
    ids = made(prompt + completion, add_special_tokens=False)["input_ids"]
    assert encoded.input_ids == [*ids, made.eos_token_id]
    backend = made.backend_tokenizer
    alone, whole = prepared(backend, prompt), prepared(backend, prompt + completion)
    spelt, count = "", 0
    tokens = made.convert_ids_to_tokens(ids)
    for token in tokens:
        spelt += token.removeprefix("##") if isinstance(backend.model, models.WordPiece) else token
        if not (whole.startswith(spelt) and alone.startswith(spelt)):
            break
        count += 1
    assume("<unk>" not in spelt)
    # A prepended ▁ with a token of its own stands where the letter after it does.
    lone = count == 1 and tokens[0] == "▁"
    assert untrained(encoded) in ((0, 1) if lone else (count,))


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(question=WORDS, answer=WORDS.filter(str.strip))
def test_a_conversation_and_a_pair_have_the_same_border(kind: str, question: str, answer: str) -> None:
    made = tokenizer(kind)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    chat = encode_chat(ChatExample(messages), made, "answers")
    pair = encode_pair(PairExample(f"{question}</s><s>", f"{answer}</s>"), made)
    assert (chat.input_ids, chat.labels) == (pair.input_ids, pair.labels)


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("kind", KINDS)
def test_an_alpaca_row_is_trained_from_its_output_on(kind: str) -> None:
    made = tokenizer(kind)
    encoded = encode_pair(AlpacaExample("a", "ab", system="b").pair(), made)
    head = made("b\n\n### Instruction:\na\n\n### Response:\n", add_special_tokens=False)["input_ids"]
    assert encoded.input_ids[: untrained(encoded)] in (head, head[:-1])
