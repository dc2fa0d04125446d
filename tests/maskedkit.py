"""Tiny models that fill masks, each with a tokenizer of its family, as folders."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from trainkit import scratch

TEXTS = [
    f"{first} {second} {third}, {fourth}."
    for first, second in (("the sun", "warms"), ("a stone", "breaks"), ("the moon", "follows"))
    for third, fourth in (
        ("the mill", "slowly"),
        ("every house", "again"),
        ("some tea", "in winter"),
        ("us", "nowhere"),
    )
]
_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 120,
}
_STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BERT, _ROBERTA = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def choice_rows() -> list[dict[str, Any]]:
    """Questions of what comes after some words, with two or three choices each."""
    found = []
    for number, text in enumerate(TEXTS):
        first, _, right = text.partition(", ")
        others = [other.partition(", ")[2] for other in TEXTS[number + 1 :] + TEXTS if not other.endswith(right)]
        choices = [right, *others[: 1 + number % 2]]
        place = number % len(choices)
        choices[0], choices[place] = choices[place], choices[0]
        found.append({"question": f"{first}?", "choices": choices, "label": place})
    return found


@functools.cache
def masked_base(kind: str) -> Path:
    """A model with its head and tokenizer: ``bert``, ``roberta``, ``modernbert`` or ``esm``."""
    folder = scratch() / f"masked-{kind}"
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        _model(kind).save_pretrained(folder)
    if kind == "esm":
        letters = [*"LAGVSERTIDPKQNFYMHWCXBUZO.-"]
        (folder / "vocab.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", *letters, "<mask>"]))
        transformers.EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    else:
        (_word_pieces() if kind == "bert" else _byte_pairs(kind)).save_pretrained(folder)
    return folder


def _model(kind: str) -> Any:
    if kind == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**_SMALL, **_STILL, max_position_embeddings=64))
    if kind == "roberta":
        sizes = {**_SMALL, **_STILL, "max_position_embeddings": 66, "pad_token_id": 1}
        return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**sizes))
    if kind == "modernbert":
        ids = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
        sizes = {**_SMALL, **ids, "max_position_embeddings": 64, "local_attention": 16}
        return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**sizes))
    sizes = {**_SMALL, **_STILL, "vocab_size": 32, "max_position_embeddings": 66, "pad_token_id": 1}
    more = {"mask_token_id": 31, "position_embedding_type": "rotary", "token_dropout": True}
    return transformers.EsmForMaskedLM(transformers.EsmConfig(**sizes, **more))


def _word_pieces() -> Any:
    built = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    built.normalizer, built.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    built.decoder = decoders.WordPiece()
    built.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=[*_BERT]))
    return _with_frame(built, *_BERT)


def _byte_pairs(kind: str) -> Any:
    names = _ROBERTA if kind == "roberta" else _BERT
    built = Tokenizer(models.BPE(unk_token=names[3] if kind == "roberta" else names[1]))
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    built.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=120, special_tokens=[*names]))
    if kind == "roberta":
        begin, pad, end, unknown, mask = names
        return _with_frame(built, pad, unknown, begin, end, mask)
    return _with_frame(built, *names)


def _with_frame(built: Tokenizer, pad: str, unknown: str, begin: str, end: str, mask: str) -> Any:
    ids = [(each, built.token_to_id(each)) for each in (begin, end)]
    pair = f"{begin} $A {end} $B:1 {end}:1" if begin == "[CLS]" else f"{begin} $A {end} {end} $B {end}"
    built.post_processor = processors.TemplateProcessing(f"{begin} $A {end}", pair, ids)
    special = {"pad_token": pad, "unk_token": unknown, "cls_token": begin, "sep_token": end, "mask_token": mask}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=built, **special)
