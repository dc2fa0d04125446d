"""Encode rows as examples, and say what became of each row. One encoder for each kind of model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from peftcli.data import store
from peftcli.data.rows import Row, truth_in
from peftcli.data.store import Outcome
from peftcli.errors import DataError, ModelError
from peftcli.tasks.settings import CausalLMSettings, Seq2SeqLMSettings
from peftcli.tasks.text.chat import (
    IGNORED,
    Encoded,
    MarkedText,
    chat_template,
    check_ids,
    encode_marked,
    mark_chat,
    mark_pair,
    mark_text,
)
from peftcli.tasks.text.findings import CUT_OFF, NO_TARGET, NONE, OVERLONG, Flag, is_damaged
from peftcli.tasks.text.formats import (
    AlpacaExample,
    ChatExample,
    ExampleReader,
    PairExample,
    ParsedRow,
    TextExample,
    shareable_texts,
)
from peftcli.tasks.text.prompts import prompt_and_answer, prompt_ids, prompt_text
from peftcli.tasks.text.spans import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Error = TypeVar("Error", DataError, ModelError)


class CausalEncoder:
    """Encodes rows for a causal language model: one text, part of which is trained.

    ``limit``: the tokens that the base model reads, where these are fewer than the settings' max_length.
    """

    def __init__(
        self,
        reader: ExampleReader,
        tokenizer: PreTrainedTokenizerBase,
        settings: CausalLMSettings,
        limit: int | None = None,
    ):
        self.reader, self.tokenizer, self.settings = reader, tokenizer, settings
        self.limit = settings.max_length if limit is None else limit
        wanted = reader.name in ("messages", "sharegpt") or (reader.name == "alpaca" and tokenizer.chat_template)
        self.template: Template | None = chat_template(tokenizer) if wanted else None
        self._compared: set[tuple[object, ...]] = set()
        written = tokenizer.chat_template if self.template is None else None
        self._marks = [each for each in tokenizer.get_added_vocab() if each.strip() and each in str(written)]
        self._may_be_raw = bool(written)

    def __call__(self, rows: Sequence[Row]) -> list[Outcome | DataError]:
        read, results = read_each(rows, self._read)
        encoded = encode_marked([marked for _, marked, _ in read.values()], self.tokenizer) if read else []
        for (example, _, _), each in zip(read.values(), encoded, strict=True):
            if isinstance(example, ChatExample) and (kind := _kind(example)) not in self._compared:
                self._compared.add(kind)
                check_ids(example, each, self.tokenizer)
        for (at, (_, marked, common)), each in zip(read.items(), encoded, strict=True):
            flags = each.flags | (Flag.PROMPT_DIFFERS if self._asks_otherwise(marked, each) else NONE)
            if self._may_be_raw and not any(mark in marked.text for mark in self._marks):
                flags |= Flag.RAW
            outcome = self._outcome(replace(each, flags=flags), rows[at])
            results[at] = outcome if isinstance(outcome, DataError) else replace(outcome, common=common)
        return results

    def _read(self, row: Row) -> tuple[ParsedRow, MarkedText, dict[str, str]]:
        example = self.reader(row)
        common = shareable_texts(example)
        if isinstance(example, AlpacaExample):
            example = example.pair() if self.template is None else example.chat()
        if isinstance(example, TextExample):
            return example, mark_text(example), common
        if isinstance(example, PairExample):
            return example, mark_pair(example, self.settings.train_on), common
        assert self.template is not None
        return example, mark_chat(example, self.template, self.settings.train_on), common

    def _asks_otherwise(self, marked: MarkedText, encoded: Encoded) -> bool:
        """Whether a prompt has other tokens alone, as where the blank at its end belongs to the answer's word."""
        if self.settings.train_on == "all" or not marked.spans:
            return False
        start = marked.spans[-1][0]
        prompt, answer = marked.text[:start], marked.text[start:]
        # what a template writes before an answer ends with a line, which only a blank after it changes
        alone = marked.rendered and prompt[-1:] == "\n" and not answer[:1].isspace()
        if alone or not prompt[-1:].isspace() or not prompt.strip():
            return False
        ids = prompt_ids(prompt, self.tokenizer, templated=marked.rendered, decoder_only=True)
        return encoded.input_ids[: len(ids)] != ids

    def _outcome(self, encoded: Encoded, row: Row) -> Outcome | DataError:
        ids, labels, limit = encoded.input_ids, encoded.labels, self.limit
        outcome = Outcome(size=len(ids), flags=encoded.flags)
        pieces = [(ids, labels)]
        if len(ids) > limit:
            how = self.settings.overlong
            if how == "error":
                return too_long(row, len(ids), limit, self.settings.max_length)
            if how == "drop":
                outcome.reason = OVERLONG
                return outcome
            if how == "truncate":
                outcome.lost = _count(labels[limit:])
                outcome.flags |= Flag.TRUNCATED | (Flag.ANSWER_CUT if outcome.lost else 0)
                pieces = [(ids[:limit], labels[:limit])]
            else:
                # Each piece begins with the last token of the one before, from which its first target is predicted.
                outcome.flags |= Flag.SPLIT
                starts = range(0, len(ids) - 1, max(1, limit - 1))
                pieces = [(ids[start : start + limit], labels[start : start + limit]) for start in starts]
        for piece_ids, piece_labels in pieces:
            # In a causal model the first token is never predicted.
            if targets := _count(piece_labels[1:]):
                arrays = {"input_ids": piece_ids, "labels": piece_labels}
                outcome.examples.append(store.Example(arrays, len(piece_ids), targets))
        if len(outcome.examples) < len(pieces) and outcome.flags & Flag.SPLIT:
            outcome.flags |= Flag.PIECES_LEFT_OUT
        if not outcome.examples:
            outcome.reason = CUT_OFF if outcome.lost else NO_TARGET
        return outcome


class Seq2SeqEncoder:
    """Examples of an encoder-decoder: the source in ``input_ids``, the target and EOS in ``labels``.

    The source is the prompt, the instruction and input, or the conversation up to its last answer; the target is the
    completion, the output, or that answer.
    """

    def __init__(self, reader: ExampleReader, tokenizer: PreTrainedTokenizerBase, settings: Seq2SeqLMSettings):
        if reader.name == "text":
            raise DataError(
                "a text alone has no source and target",
                key="dataset.format",
                hint="An encoder-decoder is trained on prompt and completion, or on instruction and output. In the "
                "recipe: dataset: {format: prompt_completion, columns: {prompt: YOUR_COLUMN, completion: YOUR_COLUMN}}",
            )
        self.reader, self.tokenizer, self.settings = reader, tokenizer, settings
        # A chat template has written the special tokens already.
        self.rendered = bool(tokenizer.chat_template) and reader.name in ("messages", "sharegpt")

    def __call__(self, rows: Sequence[Row]) -> list[Outcome | DataError]:
        pairs, results = read_each(rows, self._read)
        if not pairs:
            return results
        texts, wanted, _ = map(list, zip(*pairs.values(), strict=True))
        options = {"return_attention_mask": False, "verbose": False}
        sources = self.tokenizer(texts, add_special_tokens=not self.rendered, **options)["input_ids"]
        targets = self.tokenizer(text_target=wanted, **options)["input_ids"]
        for (at, read), source, target in zip(pairs.items(), sources, targets, strict=True):
            results[at] = self._outcome(read, source, self._with_eos(target), rows[at])
        return results

    def _read(self, row: Row) -> tuple[str, str, dict[str, str]]:
        example = self.reader(row)
        prompt, answer = prompt_and_answer(example)
        return prompt_text(prompt, self.tokenizer, decoder_only=False)[0], answer, shareable_texts(example)

    def _outcome(
        self, read: tuple[str, str, dict[str, str]], source: list[int], target: list[int], row: Row
    ) -> Outcome | DataError:
        limit, longest = self.settings.max_length, max(len(source), len(target))
        text, answer, common = read
        outcome = Outcome(size=len(source) + len(target), common=common)
        if is_damaged(f"{text}\n{answer}"):
            outcome.flags |= Flag.DAMAGED
        if self.tokenizer.eos_token_id is None:
            outcome.flags |= Flag.OPEN
        if longest > limit:
            if self.settings.overlong == "error":
                return too_long(row, longest, limit, limit)
            if self.settings.overlong == "drop":
                outcome.reason = OVERLONG
                return outcome
            outcome.lost = max(0, len(target) - limit)
            outcome.flags |= Flag.TRUNCATED | (Flag.ANSWER_CUT if outcome.lost else 0)
            if len(source) > limit:  # the special tokens at its end stay
                options = {"add_special_tokens": not self.rendered, "truncation": True, "max_length": limit}
                source = self.tokenizer(text, **options)["input_ids"]
        labels = target[:limit]
        outcome.examples.append(store.Example({"input_ids": source, "labels": labels}, len(source), len(labels)))
        return outcome

    def _with_eos(self, ids: list[int]) -> list[int]:
        """The ids of a target, which end with EOS; some tokenizers put a language code after it."""
        eos = self.tokenizer.eos_token_id
        return ids if eos is None or eos in ids[-2:] else [*ids, eos]


def flag_unread(
    outcomes: list[Outcome | DataError], rows: Sequence[Row], reader: ExampleReader
) -> list[Outcome | DataError]:
    """Flag the outcomes of rows whose columns that are not read change what is learnt; return them all."""
    for outcome, row in zip(outcomes, rows, strict=True):
        if isinstance(outcome, Outcome):
            outcome.flags |= Flag.DROPS_TURNS if reader.drops_turns(row) else NONE
            is_bad = reader.verdict is not None and truth_in(row.values.get(reader.verdict)) is False
            outcome.flags |= Flag.BAD_ANSWER if is_bad else NONE
    return outcomes


def read_each(rows: Sequence[Row], read: Callable[[Row], T]) -> tuple[dict[int, T], list[Outcome | DataError]]:
    """Return what ``read`` makes of each row, by its index, and an outcome of each: the error of one that it refuses.

    Raises:
        ModelError: no row can be read.
    """
    found, results = dict[int, T](), list[Outcome | DataError]()
    for at, row in enumerate(rows):
        try:
            found[at] = read(row)
            results.append(Outcome())
        except DataError as error:
            results.append(_with_place(error, row))
        except ModelError as error:
            raise _with_place(error, row) from error
    return found, results


def _kind(example: ChatExample) -> tuple[object, ...]:
    """Conversations of one kind are written by the same code of a tokenizer."""
    keys = frozenset(key for message in example.messages for key in (message["role"], *message))
    return keys, bool(example.tools)


def _with_place(error: Error, row: Row) -> Error:
    """Add the row's place to an error that has none."""
    if error.file is not None:
        return error
    at = row.place.error(error.message)
    return type(error)(at.message, file=at.file, line=at.line, key=error.key, hint=error.hint)


def too_long(row: Row, length: int, limit: int, max_length: int) -> DataError:
    """Return the error of a row that is longer than ``max_length``, or than the ``limit`` of the base model."""
    if limit < max_length:
        return row.place.error(
            f"has {length} tokens, more than the {limit} that the base model reads",
            hint="Shorten it, or set dataset.overlong: truncate or drop.",
        )
    return row.place.error(
        f"has {length} tokens, more than dataset.max_length: {limit}",
        hint="Raise dataset.max_length, or set dataset.overlong: truncate or drop.",
    )


def _count(labels: Sequence[int]) -> int:
    return len(labels) - labels.count(IGNORED)
