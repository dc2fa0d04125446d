"""Audit the tokens of a whole dataset: answers without text, missing prompts, the ends of answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from peftcli.data.findings import Finding
from peftcli.data.store import View
from peftcli.data.used_rows import Ragged, UsedRows, scatter
from peftcli.tasks.shown import Description, Shared
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.findings import FINDINGS, Flag
from peftcli.tasks.text.token_text import TokenRenderer, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOW_SHARE = 0.01
_LONGEST_ANSWER = 8
"""A longer answer, in tokens, is not examined: it has text."""
_LISTED_ENDS = 5


class TextAudit:
    """All examples of a language task, examined once.

    ``aligned``: labels belong to the input's tokens, as in a causal model, and are no text of their own. ``beside``:
    columns of what is asked besides the text, as pictures. ``unread``: tokens of each example that are no text.
    """

    def __init__(
        self,
        view: View,
        tokenizer: PreTrainedTokenizerBase,
        *,
        aligned: bool,
        beside: Sequence[str] = (),
        unread: np.ndarray | None = None,
    ):
        self.rows = rows = UsedRows(view)
        self._tokens = _Tokens(tokenizer)
        self._sizes = rows.sums(view.sizes if aligned else view.sizes + view.targets)
        self._texts = self._sizes if unread is None else self._sizes - rows.sums(unread)
        self._targets = rows.sums(view.targets)
        self._prompts = np.zeros(len(rows), np.uint64)
        self._without_text, self._all_trained = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
        self._ends = Counter[int]()
        for some, (inputs, labels) in rows.chunks("input_ids", "labels"):
            chunk = _Chunk(inputs, labels, aligned)
            self._prompts[some] = chunk.prompts()
            self._without_text[some] = chunk.answers_without_text(self._tokens)
            self._all_trained[some] = chunk.all_trained(self._tokens)
            self._ends.update(chunk.ends())
        if beside:
            self._prompts = np.where(self._prompts, scatter(self._prompts ^ rows.hashes(*beside)), self._prompts)

    @cached_property
    def _flags(self) -> np.ndarray:
        return self.rows.records("flags")

    def findings(self) -> list[Finding]:
        """Return the findings about the tokens of the rows."""
        masks = {
            "empty_answers": self._without_text & (self._flags & Flag.ANSWER_CUT == 0),
            # Where all of every row is trained, a row is a text, and has no prompt to be empty.
            "empty_prompts": self._all_trained & (not self._all_trained.all()),
            "low_trained_share": self._targets < _LOW_SHARE * self._texts,
        }
        return self.rows.findings((FINDINGS[name], mask) for name, mask in masks.items())

    @property
    def prompts(self) -> np.ndarray:
        """A hash of what each row asks; 0: nothing."""
        return self._prompts

    def describe(self) -> Description:
        """Return what ``inspect`` also reports of the rows."""
        targets, tokens, used = int(self._targets.sum()), int(self._sizes.sum()), len(self.rows)
        closed = self._flags & (Flag.OPEN | Flag.ANSWER_CUT) == 0
        ordered = sorted(self._ends.items(), key=lambda each: (-each[1], each[0]))
        ends = {self._tokens.text(token): count for token, count in ordered[:_LISTED_ENDS]}
        flags = {str(flag.name).lower(): int((self._flags & flag != 0).sum()) for flag in Flag}
        share_trained = targets / tokens if tokens else 0.0
        ends_trained = float(closed.mean()) if used else 0.0
        facts = {"flags": flags, "share_trained": share_trained, "ends_trained": ends_trained, "ends": ends}
        lines = {
            "trained tokens": f"{targets:,} ({share_trained:.1%})",
            "rows cut at max_length": f"{flags['truncated']:,}",
            "trained tokens lost there": f"{int(self.rows.records('lost').sum()):,}",
            "rows whose answers' ends are trained": f"{ends_trained:.1%}",
            "last trained token": ", ".join(f"{text!r} {count / used:.0%}" for text, count in list(ends.items())[:2]),
        }
        return Description(facts, lines, [Shared("prompts", FINDINGS["prompts_in_eval"], self._prompts)])


@dataclass(frozen=True)
class _Chunk:
    """Some consecutive rows."""

    inputs: Ragged
    labels: Ragged
    aligned: bool

    def prompts(self) -> np.ndarray:
        """A hash of each row's prompt; 0 where it has none."""
        lengths = self.inputs.lengths
        if self.aligned:
            count = len(self.labels.values)
            trained = np.where(self.labels.values != IGNORED, np.arange(count), count)
            lengths = np.minimum.reduceat(trained, self.labels.starts) - self.labels.starts
        some = lengths > 1  # one token is BOS
        starts, lengths = self.inputs.starts[some], lengths[some]
        out = np.zeros(len(self.inputs.starts), np.uint64)
        if some.any():
            inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            ids = self.inputs.values[np.repeat(starts, lengths) + inside]
            out[some] = Ragged(ids, np.cumsum(lengths) - lengths).hashes()
        return out

    def ends(self) -> dict[int, int]:
        """The last trained token of each row -> the number of rows that end with it."""
        at = np.where(self.labels.values != IGNORED, np.arange(len(self.labels.values)), 0)
        last = self.labels.values[np.maximum.reduceat(at, self.labels.starts)]
        values, counts = np.unique(last, return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))

    def answers_without_text(self, tokens: _Tokens) -> np.ndarray:
        """A mask of the rows with an answer, a run of trained tokens, of special tokens and white space only."""
        trained, owners = self.labels.values != IGNORED, self.labels.owners()
        border = np.diff(owners, prepend=-1) != 0
        begins = np.flatnonzero(trained & (border | ~np.concatenate([[False], trained[:-1]])))
        ends = np.flatnonzero(trained & np.concatenate([border[1:] | ~trained[1:], [True]])) + 1
        short = ends - begins <= _LONGEST_ANSWER
        out = np.zeros(len(self.labels.starts), bool)
        for begin, end in zip(begins[short].tolist(), ends[short].tolist(), strict=True):
            if all(tokens.is_blank(token) for token in self.labels.values[begin:end].tolist()):
                out[owners[begin]] = True
        return out

    def all_trained(self, tokens: _Tokens) -> np.ndarray:
        """A mask of the rows without a prompt: every token that is not trained is special."""
        if not self.aligned:
            return np.zeros(len(self.inputs.starts), bool)
        special = tokens.special[np.minimum(self.inputs.values, len(tokens.special) - 1)]
        return ~np.logical_or.reduceat((self.labels.values == IGNORED) & ~special, self.inputs.starts)


class _Tokens:
    """Single tokens of a tokenizer: their text, and which are special."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._renderer = TokenRenderer(tokenizer)
        self._blank: dict[int, bool] = {}
        special = special_tokens(tokenizer)
        self.special = np.zeros(max(special, default=0) + 2, bool)
        self.special[sorted(special)] = True

    def is_blank(self, token: int) -> bool:
        """Whether a token is special, or white space."""
        known = self._blank.get(token)
        if known is None:
            special = token < len(self.special) and bool(self.special[token])
            known = self._blank[token] = special or not self.text(token).strip()
        return known

    def text(self, token: int) -> str:
        return "".join(each.text for each in self._renderer.render([token]))
