"""Examples of language models, made from and read back as lists of ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftcli.data.store import Column, Example, Outcome
from peftcli.tasks.text.chat import (
    Encoded,
    chat_template,
    check_ids,
    encode_marked,
    mark_chat,
    mark_pair,
    mark_text,
)
from peftcli.tasks.text.formats import ChatExample, PairExample, TextExample

COLUMNS = {"input_ids": Column(), "labels": Column()}
Ids = dict[str, list[int]]


def example(ids: Ids, targets: int = 0) -> Example:
    return Example(ids, len(ids["input_ids"]), targets)


def outcome(examples: Sequence[Ids], targets: Sequence[int], *, tokens: int = 0, **more: Any) -> Outcome:
    return Outcome([example(*each) for each in zip(examples, targets, strict=True)], size=tokens, **more)


def plain(found: Example) -> Ids:
    return {name: [int(each) for each in array] for name, array in found.arrays.items()}


def encode_text(example: TextExample, tokenizer: Any) -> Encoded:
    return encode_marked([mark_text(example)], tokenizer)[0]


def encode_pair(example: PairExample, tokenizer: Any) -> Encoded:
    return encode_marked([mark_pair(example)], tokenizer)[0]


def encode_chat(example: ChatExample, tokenizer: Any, train_on: str) -> Encoded:
    encoded = encode_marked([mark_chat(example, chat_template(tokenizer), train_on)], tokenizer)[0]
    check_ids(example, encoded, tokenizer)
    return encoded
