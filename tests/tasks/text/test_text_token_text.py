from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from peftcli.tasks.shown import TokenText
from peftcli.tasks.text.token_text import TokenRenderer

TEXTS = ["plain words", " two  spaces\n\nand\ttabs ", "h\u00e9llo \U0001f389 \u6f22\u5b57 caf\u00e9", "x\ufffdy", "a"]
IGNORED = -100


def _byte_fallback() -> PreTrainedTokenizerFast:
    """In the manner of Llama 2: characters, spaces as U+2581, other characters as bytes."""
    known = [
        *["<unk>", "<s>", "</s>"],
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *map(chr, range(97, 123)),
    ]
    model = models.BPE({word: at for at, word in enumerate(known)}, [], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _metaspace() -> PreTrainedTokenizerFast:
    """In the manner of T5."""
    words = ["</s>", "<unk>", "\u2581", "\u2581plain", "\u2581words", "ly", *map(chr, range(97, 123))]
    backend = Tokenizer(models.Unigram([(word, -float(at)) for at, word in enumerate(words)], unk_id=1))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def _wordpiece() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "[SEP]", "plain", "word", "##s", "un", "##plain"]
    backend = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", sep_token="[SEP]")


def _byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["plain words"] * 9, trainer)
    backend.add_tokens([AddedToken("<think>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def texts(tokens: list[TokenText]) -> list[str]:
    """Without tokens that add nothing, as the space that some tokenizers put before a text."""
    return [piece.text for piece in tokens if piece.text]


@pytest.mark.parametrize("make", [_byte_level, _byte_fallback])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text_and_all_of_the_ids(make, text: str) -> None:
    tokenizer = make()
    ids = ids_of(tokenizer, text)
    tokens = TokenRenderer(tokenizer).render(ids)
    assert "".join(texts(tokens)) == text
    assert [token for piece in tokens for token in piece.ids] == ids
    assert TokenRenderer(tokenizer).text(ids) == text


@pytest.mark.parametrize("make", [_byte_level, _byte_fallback])
def test_a_character_is_one_piece_or_shows_its_bytes_where_it_is_cut(make) -> None:
    tokenizer = make()
    ids = ids_of(tokenizer, "x\U0001f389y")
    tokens = TokenRenderer(tokenizer).render(ids)
    assert texts(tokens) == ["x", "\U0001f389", "y"]
    assert len(tokens[-2].ids) == 4
    assert texts(TokenRenderer(tokenizer).render(ids[:-2])) == ["x", "\\xf0\\x9f\\x8e"]
    end = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
    cut = texts(TokenRenderer(tokenizer).render([*ids[:-3], end, *ids[-3:]]))
    assert cut == ["x", "\\xf0\\x9f", tokenizer.eos_token, "\\x8e", "\\x89", "y"]


def test_a_character_that_is_trained_in_part_shows_which() -> None:
    tokenizer = _byte_level()
    ids = ids_of(tokenizer, "\U0001f389")
    tokens = TokenRenderer(tokenizer).render(ids, [IGNORED, IGNORED, *ids[2:]])
    assert [(piece.text, piece.trained) for piece in tokens] == [
        ("\\xf0\\x9f", False),
        ("\\x8e", True),
        ("\\x89", True),
    ]


def test_trained_and_special_tokens_are_told() -> None:
    tokenizer = _byte_level()
    ids = ids_of(tokenizer, "plain<think> words<|end|>")
    tokens = TokenRenderer(tokenizer).render(ids, [IGNORED, *ids[1:]])
    assert tokens[0].trained is False
    assert all(piece.trained for piece in tokens[1:])
    assert [piece.text for piece in tokens if piece.special] == ["<|end|>"]
    assert "<think>" in texts(tokens)


def test_metaspace() -> None:
    tokenizer = _metaspace()
    ids = [*ids_of(tokenizer, "plain words wordsly"), 0]
    assert texts(TokenRenderer(tokenizer).render(ids)) == ["plain", " words", " words", "ly", "</s>"]


def test_a_tokenizer_of_another_kind_is_spelled_by_what_each_token_adds() -> None:
    tokenizer = _wordpiece()
    ids = [*ids_of(tokenizer, "plain words unplain"), 1]
    tokens = TokenRenderer(tokenizer).render(ids)
    assert texts(tokens) == ["plain", " word", "s", " un", "plain", " [SEP]"]
    assert tokens[-1].special
