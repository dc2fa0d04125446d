"""Fill-in-the-middle: the end of a text before a part of it, which is what is trained.

Prefix, suffix, middle, cut between any two characters: https://arxiv.org/abs/2207.14255
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from peftcli.data.rows import Row
from peftcli.data.store import Example, Outcome
from peftcli.errors import DataError, ModelError
from peftcli.tasks.settings import CausalLMSettings
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.encode import read_each, too_long
from peftcli.tasks.text.findings import NONE, OVERLONG, Flag, is_damaged
from peftcli.tasks.text.formats import ExampleReader, TextExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES = (
    ("fimprefix", "fimsuffix", "fimmiddle"),
    ("fimbegin", "fimhole", "fimend"),
    ("codeprefix", "codesuffix", "codemiddle"),
    ("pre", "suf", "mid"),
    ("prefix", "suffix", "middle"),
)
"""Names of the tokens before prefix, suffix and middle, by their letters: ``<|fim_prefix|>`` and ``<fim-prefix>`` are
one."""
_SLACK = 6
"""Tokens by which the three parts of a text may be more than the text."""


def middle_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[int, int, int]:
    """Return the tokens before prefix, suffix and middle, as a base model of this ``name`` was trained with.

    Raises:
        ModelError: its tokenizer has none.
    """
    special = {re.sub("[^a-z]", "", str(token).lower()): at for at, token in tokenizer.added_tokens_decoder.items()}
    found = next((names for names in _NAMES if {*names} <= special.keys()), None)
    if found is None:
        message = f"{name} was not trained to fill in a middle: its tokenizer has no tokens for prefix, suffix, middle"
        hint = "name a model of code that has them, as <|fim_prefix|>, or leave out dataset.train_on: middle"
        raise ModelError(message, key="base_model", hint=hint)
    if tokenizer.decode(tokenizer("x", add_special_tokens=False)["input_ids"][:1]) != "x":
        message = f"the tokenizer of {name} puts a blank before each part of a text, which a middle does not begin with"
        raise ModelError(message, key="base_model", hint="leave out dataset.train_on: middle")
    return special[found[0]], special[found[1]], special[found[2]]


class MiddleEncoder:
    """Encodes texts for ``train_on: middle``: prefix, suffix, and the middle, which is trained with EOS.

    Where a text is cut is drawn by the text itself. ``name`` is the base model's.
    """

    def __init__(
        self, reader: ExampleReader, tokenizer: PreTrainedTokenizerBase, settings: CausalLMSettings, name: str
    ):
        if reader.name != "text":
            message = "train_on: middle needs rows of texts, of which any part may be the middle"
            raise DataError(message, key="dataset.train_on", hint="dataset: {format: text, columns: {text: ...}}")
        if not tokenizer.is_fast:
            message = "train_on: middle needs a tokenizer that knows places in the text (a fast one)"
            raise DataError(message, key="dataset.train_on")
        self.reader, self.tokenizer, self.settings = reader, tokenizer, settings
        self.marks, eos = middle_tokens(tokenizer, name), tokenizer.eos_token_id
        first = tokenizer("x")["input_ids"][:1]
        self.first: list[int] = first if first == [tokenizer.bos_token_id] else []
        self.last: list[int] = [] if eos is None else [eos]
        self.room = settings.max_length - len(self.first) - len(self.marks) - len(self.last)

    def __call__(self, rows: Sequence[Row]) -> list[Outcome | DataError]:
        texts, results = read_each(rows, self._text)
        for at, text in texts.items():
            results[at] = self._outcome(text, rows[at])
        return results

    def _text(self, row: Row) -> str:
        example = self.reader(row)
        assert isinstance(example, TextExample)
        if len(example.text) < 2:
            raise row.place.error("has one character, and no middle")
        return example.text

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _outcome(self, text: str, row: Row) -> Outcome | DataError:
        ids, how = self._ids(text), self.settings.overlong
        outcome = Outcome(size=len(ids) + self.settings.max_length - self.room)
        outcome.flags |= Flag.DAMAGED if is_damaged(text) else NONE
        outcome.flags |= Flag.MARKERS if {*self.marks} & {*ids} else NONE
        outcome.flags |= NONE if self.last else Flag.OPEN
        pieces = [text]
        if len(ids) > self.room:
            if how == "error":
                return too_long(row, outcome.size, self.settings.max_length, self.settings.max_length)
            if how == "drop":
                outcome.reason = OVERLONG
                return outcome
            pieces = self._pieces(text)
            outcome.flags |= Flag.TRUNCATED if how == "truncate" else Flag.SPLIT
            pieces = pieces[:1] if how == "truncate" else pieces
        outcome.examples = [self._example(piece) for piece in pieces if len(piece) > 1]
        return outcome

    def _pieces(self, text: str) -> list[str]:
        """Parts of a text that fit."""
        size = max(1, self.room - _SLACK)
        places = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = [start for start, _ in places["offset_mapping"]][::size]
        return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]

    def _example(self, text: str) -> Example:
        draw = np.random.default_rng(zlib.crc32(text.encode("utf-8", "replace")))
        start, end = sorted(draw.choice(len(text) + 1, 2, replace=False).tolist())
        before, middle, after = map(self._ids, (text[:start], text[start:end], text[end:]))
        surplus = max(0, len(before) + len(middle) + len(after) - self.room)
        cut = min(surplus, len(after))
        after, before = after[: len(after) - cut], before[surplus - cut :]
        answer = [*middle[: self.room], *self.last]
        prefix, suffix, mark = self.marks
        asked = [*self.first, prefix, *before, suffix, *after, mark]
        arrays = {"input_ids": [*asked, *answer], "labels": [*[IGNORED] * len(asked), *answer]}
        return Example(arrays, len(asked) + len(answer), len(answer))
