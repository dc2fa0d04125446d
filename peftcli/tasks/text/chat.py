"""Token ids and labels: what a model reads, and which part of it is trained.

A token that crosses the border of an answer belongs to the answer: the answer's text cannot be produced without it. A
special token belongs to it only if it begins inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftcli.errors import DataError
from peftcli.tasks.text.findings import NONE, Flag, has_odd_turns, is_damaged
from peftcli.tasks.text.formats import ChatExample, PairExample, TextExample
from peftcli.tasks.text.spans import Template, tokenize

if TYPE_CHECKING:
    from tokenizers.normalizers import Normalizer
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that does not count in the loss."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """An example as the model reads it."""

    input_ids: list[int]
    labels: list[int]
    """The ids again, IGNORED where not trained."""
    flags: Flag = NONE
    """Facts about the row."""


@dataclass(frozen=True)
class MarkedText:
    """A text to tokenise, and its trained characters."""

    text: str
    spans: tuple[Span, ...] | None = None
    """Trained characters; None: every token."""
    rendered: bool = False
    """Whether a chat template wrote the special tokens into ``text``. Otherwise the tokenizer adds its own, and EOS."""
    flags: Flag = NONE
    """Facts about the row."""


def mark_text(example: TextExample) -> MarkedText:
    """Mark all of a text as trained."""
    return MarkedText(example.text, flags=Flag.DAMAGED if is_damaged(example.text) else NONE)


def mark_pair(example: PairExample, train_on: str = "answers") -> MarkedText:
    """Join prompt and completion; the completion is trained, or both."""
    text = example.prompt + example.completion
    spans = None if train_on == "all" else ((len(example.prompt), len(text)),)
    flags = Flag.DAMAGED if is_damaged(text) else NONE
    return MarkedText(text, spans, flags=flags if example.prompt else flags | Flag.NO_PROMPT)


def mark_chat(example: ChatExample, template: Template, train_on: str) -> MarkedText:
    """Render a conversation and mark the answers that ``train_on`` says.

    Raises:
        DataError: the template refuses the conversation, or its answers cannot be located with certainty.
    """
    flags = _flags(example, template)
    if train_on == "all" and (other := [at for at in example.untrained if example.messages[at]["role"] != "assistant"]):
        role = example.messages[other[0]]["role"]
        raise DataError(
            f"message {other[0] + 1} ({role}) says train: false; with dataset.train_on: all only an assistant turn can",
            hint="Leave the message out, or set dataset.train_on: answers.",
        )
    turns = [at for at, message in enumerate(example.messages) if message["role"] == "assistant"]
    if train_on == "last_answer":
        turns = turns[-1:]
    which = [at for at in turns if (at in example.untrained) == (train_on == "all")]
    rendered = template.answers(example.messages, example.tools, which)
    if rendered.unseen:
        flags |= Flag.UNSEEN
    spans = tuple((each.start, each.end) for each in rendered.answers)
    if train_on == "all":
        # All but the turns that were looked for; all tokens if there are none.
        borders = [0, *(border for span in spans for border in span), len(rendered.text)]
        rest = tuple(zip(borders[::2], borders[1::2], strict=True))
        return MarkedText(rendered.text, rest if spans else None, rendered=True, flags=flags)
    if rendered.answers and not template.asks_so(rendered, example.messages, example.tools):
        flags |= Flag.PROMPT_DIFFERS
    if not all(each.closed for each in rendered.answers):
        flags |= Flag.OPEN
    return MarkedText(rendered.text, spans, rendered=True, flags=flags)


def _flags(example: ChatExample, template: Template) -> Flag:
    """The flags of a conversation before it is rendered."""
    contents = "\n".join(text for message in example.messages for text in message.values() if isinstance(text, str))
    flags = Flag.DAMAGED if is_damaged(contents) else NONE
    if template.markers.search(contents):
        flags |= Flag.MARKERS
    if has_odd_turns([message["role"] for message in example.messages]):
        flags |= Flag.ODD_TURNS
    if example.no_prompt:
        flags |= Flag.NO_PROMPT
    return flags


def chat_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """Return the tokenizer's chat template.

    Raises:
        DataError: the tokenizer has none.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the base model's tokenizer has no chat template, so conversations cannot be written in the model's format",
            hint="Use the model's instruct version, give it a template (base_model.chat_template: chatml, or a .jinja "
            "file), or give the rows as prompt and completion.",
        )
    return Template(tokenizer)


def check_ids(example: ChatExample, encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare with ``apply_chat_template``, which some tokenizers override.

    Raises:
        DataError: the ids differ.
        ModelError: the template does not come to an end.
    """
    expected = tokenize(tokenizer, example.messages, example.tools)
    if encoded.input_ids != expected:
        raise DataError(
            "this tokenizer's apply_chat_template does not tokenise the text that it renders, so the answers cannot be "
            "located",
            hint="Give the rows as prompt and completion.",
        )


def encode_marked(texts: Sequence[MarkedText], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Tokenise texts in one batch; either all of them are rendered or none is.

    Raises:
        DataError: part of a text is trained, and the tokenizer does not report the offsets of its tokens.
    """
    partial = any(marked.spans is not None for marked in texts)
    if partial and not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} does not report the offsets of its tokens, so answers cannot be "
            "separated from prompts",
            hint="Use a base model with a fast tokenizer, or train on every token: format: text.",
        )
    batch = tokenizer(
        [marked.text for marked in texts],
        add_special_tokens=not texts[0].rendered,
        return_offsets_mapping=partial,
        return_attention_mask=False,
        verbose=False,
    )
    special, bos = set(tokenizer.added_tokens_decoder), tokenizer.bos_token_id
    normalizer = tokenizer.backend_tokenizer.normalizer if partial else None
    encoded = []
    for index, marked in enumerate(texts):
        ids = batch["input_ids"][index]
        labels = (
            ids if marked.spans is None else _labels(marked, ids, batch["offset_mapping"][index], special, normalizer)
        )
        if marked.rendered:
            double = bos is not None and ids[:2] == [bos, bos]
            encoded.append(Encoded(ids, list(labels), marked.flags | Flag.DOUBLE_BOS if double else marked.flags))
        else:
            encoded.append(_finish(marked, ids, labels, tokenizer))
    return encoded


def _finish(marked: MarkedText, ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Keep one BOS if the tokenizer adds it, and end with one EOS, which is trained."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and bos != eos and ids[:2] == [bos, bos]:
        ids, labels = ids[1:], labels[1:]
    if eos is None:
        return Encoded(ids, list(labels), marked.flags | Flag.OPEN)
    if ids[-1:] == [eos]:
        ids, labels = ids[:-1], labels[:-1]
    return Encoded([*ids, eos], [*labels, eos], marked.flags)


def _labels(
    marked: MarkedText, ids: list[int], offsets: list[Span], special: set[int], normalizer: Normalizer | None
) -> list[int]:
    """The ids of tokens that overlap one of the text's spans; IGNORED for the others."""
    labels = [IGNORED] * len(ids)
    rest = iter([(_begin(marked.text, start, normalizer), end) for start, end in marked.spans or ()])
    start, end = next(rest, (0, 0))
    before = 0
    for index, (left, right) in enumerate(offsets):
        # A token of white space has no width in tokenizers that trim it: it reaches back to the token before.
        left, before = left if left < right else min(before, left), right
        while left >= end and (following := next(rest, None)):
            start, end = following
        if left < start < right and ids[index] in special:
            # A special token may swallow the white space beside it.
            left += right - left - len(marked.text[left:right].lstrip())
            right = right if left >= start else start
        if right > start and left < end:
            labels[index] = ids[index]
    return labels


def _begin(text: str, start: int, normalizer: Normalizer | None) -> int:
    """The first of the characters that the tokenizer composes with the one at ``start``, such as e and an accent."""
    while normalizer and 0 < start < len(text) and not text[start].isascii():
        # Eight characters hold any letter and its accents.
        before, both = (normalizer.normalize_str(text[max(0, start - 8) : end]) for end in (start, start + 1))
        if both.startswith(before):
            break
        start -= 1
    return start
