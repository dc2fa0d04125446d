"""What the tokens of a whole dataset show: sizes, duplicates, answers without text, evaluation rows that are trained.

Reads the tokens once, a chunk at a time, and holds some 400 bytes a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from peftcli.data.findings import Finding
from peftcli.data.rows import Place
from peftcli.data.store import BAD, USED, Store, View
from peftcli.inspection.duplicates import (
    MOST_ROWS,
    SAMPLE,
    Pairs,
    Rows,
    Sketches,
    common_shingles,
    repeats,
    row_hashes,
    slices,
    spread,
)
from peftcli.tasks.findings import FINDINGS
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.flags import Flag
from peftcli.tasks.text.token_text import Speller, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COLUMNS = ("input_ids", "labels")
_LISTED = 10
_LISTED_BAD = 20
_BARS = 20
_QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "max": 1.0}
_LOW_SHARE = 0.01
_COMMON_PROMPT = 0.05
_SHORT_ANSWER = 8
"""An answer of more tokens is not looked at: it holds text."""


@dataclass(frozen=True)
class Audit:
    """What was found out about the training data, or about the evaluation data."""

    facts: dict[str, Any]
    """Numbers, as ``inspect --json`` gives them."""
    findings: list[Finding]
    used: UsedRows
    hashes: np.ndarray
    """Of each used row."""
    prompts: np.ndarray
    """Of what stands before the first trained token of each used row."""


def audit(view: View, tokenizer: PreTrainedTokenizerBase, *, aligned: bool = True, split: str = "train") -> Audit:
    """Looks at every row.

    Args:
        view: The features.
        tokenizer: What made them.
        aligned: Whether labels stand beside the input's tokens, as in a causal model, or are a text of their own.
        split: ``train`` or ``eval``: how findings name the rows.
    """
    used = UsedRows(view, aligned)
    hashes, prompts = np.zeros(len(used), np.uint64), np.zeros(len(used), np.uint64)
    no_text, all_trained = np.zeros(len(used), bool), np.zeros(len(used), bool)
    ends, words = Counter[int](), _Words(tokenizer)
    sample = spread(len(used), SAMPLE)
    common = common_shingles(used.read(sample[some]) for some in slices(used.tokens[sample]))
    sketches = Sketches(common, every=max(1, -(-len(used) // MOST_ROWS)))
    for chunk in used.chunks():
        hashes[chunk.slice], prompts[chunk.slice] = row_hashes(chunk.rows), chunk.prompts()
        no_text[chunk.slice] = chunk.answers_without_text(words)
        all_trained[chunk.slice] = chunk.all_trained(words)
        ends.update(chunk.ends())
        sketches.add(chunk.slice.start, chunk.rows)
    again = repeats(hashes)
    near = sketches.pairs(used.read, used.tokens, among=~again)
    low = used.targets < _LOW_SHARE * used.tokens
    no_text &= used.flags & Flag.ANSWER_CUT == 0
    found_rows = {
        "empty_answers": no_text,
        # Where all of every row is trained, a row is a text, and has no prompt to be empty.
        "empty_prompts": all_trained & (not all_trained.all()),
        "exact_duplicates": again,
        "near_duplicates": np.isin(np.arange(len(used)), near.later),
        "low_trained_share": low,
    }
    findings = [
        FINDINGS[name].finding(int(mask.sum()), len(used), used.places(mask), split=split)
        for name, mask in found_rows.items()
        if mask.any()
    ]
    facts = _facts(view, used) | {
        "columns_not_read": sorted(
            {name for part in view.parts for name in part.store.about.get("columns_not_read", ())}
        ),
        "ends": {
            words.text(token): count for token, count in sorted(ends.items(), key=lambda each: (-each[1], each[0]))[:5]
        },
        "duplicates": {
            "exact": int(again.sum()),
            "near": len(near.later),
            "compared": near.compared,
            "pairs": _described(near, used),
        },
    }
    return Audit(facts, findings, used, hashes, prompts)


def leaks(train: Audit, evaluation: Audit) -> tuple[dict[str, int], list[Finding]]:
    """Evaluation rows that are trained, and those whose prompt is."""
    rows = np.isin(evaluation.hashes, train.hashes)
    values, counts = np.unique(train.prompts, return_counts=True)
    telling = values[(values != 0) & (counts <= max(2, _COMMON_PROMPT * len(train.used)))]
    prompts = np.isin(evaluation.prompts, telling) & ~rows
    findings = [
        FINDINGS[name].finding(int(mask.sum()), len(mask), evaluation.used.places(mask), split="eval")
        for name, mask in (("train_in_eval", rows), ("prompts_in_eval", prompts))
        if mask.any()
    ]
    return {"rows": int(rows.sum()), "prompts": int(prompts.sum())}, findings


class UsedRows:
    """The rows that have features, in order. A row that was split is the sequence of its features."""

    def __init__(self, view: View, aligned: bool):
        self.view, self.aligned = view, aligned
        parts, numbers, firsts = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
        before = 0
        positions = [part.examples for part in view.parts]
        for at, size in enumerate(view.counts):
            rows = view.parts[at].store.row_of[positions[at]]
            first = np.flatnonzero(np.diff(rows, prepend=-1))
            parts.append(np.full(len(first), at))
            numbers.append(rows[first])
            firsts.append(first + before)
            before += size
        nothing = np.zeros(0, np.int64)
        self.part, self.number = np.concatenate([nothing, *parts]), np.concatenate([nothing, *numbers])
        """Part of the view, and position in the part's store, of each row."""
        self.first = np.concatenate([nothing, *firsts, [before]])
        """Each row's first feature; at the end, the number of features."""
        self.position = np.concatenate([nothing, *positions])
        """The position of each feature in its store."""
        self.targets = self._sums(view.targets)
        self.tokens = self._sums(self.lengths)

    def __len__(self) -> int:
        return len(self.part)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each feature, input and labels where these are a text of their own."""
        if self.aligned:
            return self.view.sizes
        return self.view.sizes + self.view.targets  # such a text is a target throughout

    @cached_property
    def flags(self) -> np.ndarray:
        """The flags of each row."""
        return self._records("flags")

    @cached_property
    def lost(self) -> np.ndarray:
        """How many targets of each row a cut took away."""
        return self._records("lost")

    def _records(self, name: str) -> np.ndarray:
        out = np.zeros(len(self), np.int64)
        for at, part in enumerate(self.view.parts):
            mine = self.part == at
            out[mine] = part.store.rows[name][self.number[mine]]
        return out

    def _sums(self, values: np.ndarray) -> np.ndarray:
        ends = np.concatenate([[0], np.cumsum(values)])
        return ends[self.first[1:]] - ends[self.first[:-1]]

    def place(self, row: int) -> Place:
        """Where a row stands."""
        return self.view.parts[self.part[row]].store.place(int(self.number[row]))

    def places(self, mask: np.ndarray) -> Iterator[Place]:
        """Where the rows of a mask stand."""
        return (self.place(int(row)) for row in np.flatnonzero(mask))

    def chunks(self) -> Iterator[_Chunk]:
        """All rows, a few at a time."""
        for some in slices(self.tokens):
            features = self._features(np.arange(some.start, some.stop))
            inputs = features.joined("input_ids")
            yield _Chunk(
                some, inputs if self.aligned else features.joined(*_COLUMNS), inputs, features.joined("labels")
            )

    def read(self, rows: np.ndarray) -> Rows:
        """The tokens of some rows."""
        return self._features(rows).joined(*_COLUMNS[: 1 if self.aligned else 2])

    def _features(self, rows: np.ndarray) -> _Features:
        counts = self.first[rows + 1] - self.first[rows]
        starts = np.cumsum(counts) - counts
        inside = np.arange(counts.sum()) - np.repeat(starts, counts)
        positions = self.position[np.repeat(self.first[rows], counts) + inside]
        stores = [self.view.parts[at].store for at in np.repeat(self.part[rows], counts).tolist()]
        return _Features(list(zip(stores, positions.tolist(), strict=True)), starts)


@dataclass(frozen=True)
class _Features:
    """The features of some rows."""

    found: list[tuple[Store, int]]
    """The store of each, and its position there."""
    starts: np.ndarray
    """The first of each row."""

    def joined(self, *columns: str) -> Rows:
        """The tokens of these columns, row by row."""
        arrays = [np.asarray(store.value(name, position)) for store, position in self.found for name in columns]
        lengths = np.array([0, *map(len, arrays)])
        return Rows(np.concatenate(arrays), np.cumsum(lengths)[self.starts * len(columns)])


@dataclass(frozen=True)
class _Chunk:
    """Some rows that follow one another."""

    slice: slice
    rows: Rows
    """All of their tokens."""
    inputs: Rows
    labels: Rows

    @property
    def aligned(self) -> bool:
        return self.rows is self.inputs

    def prompts(self) -> np.ndarray:
        """A hash of each row's prompt; 0 where it has none."""
        lengths = self.inputs.lengths
        if self.aligned:
            trained = np.where(self.labels.ids != IGNORED, np.arange(len(self.labels.ids)), len(self.labels.ids))
            lengths = np.minimum.reduceat(trained, self.labels.starts) - self.labels.starts
        some = lengths > 1  # one token is BOS
        starts, lengths = self.inputs.starts[some], lengths[some]
        out = np.zeros(len(self.inputs.starts), np.uint64)
        if some.any():
            inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            ids = self.inputs.ids[np.repeat(starts, lengths) + inside]
            out[some] = row_hashes(Rows(ids, np.cumsum(lengths) - lengths))
        return out

    def ends(self) -> dict[int, int]:
        """The last trained token of each row -> how many rows end so."""
        at = np.where(self.labels.ids != IGNORED, np.arange(len(self.labels.ids)), 0)
        last = self.labels.ids[np.maximum.reduceat(at, self.labels.starts)]
        values, counts = np.unique(last, return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))

    def answers_without_text(self, words: _Words) -> np.ndarray:
        """Which rows have an answer, a run of trained tokens, that is nothing but special tokens and white space."""
        trained, owners = self.labels.ids != IGNORED, self.labels.owners()
        border = np.diff(owners, prepend=-1) != 0
        begins = np.flatnonzero(trained & (border | ~np.concatenate([[False], trained[:-1]])))
        ends = np.flatnonzero(trained & np.concatenate([border[1:] | ~trained[1:], [True]])) + 1
        short = ends - begins <= _SHORT_ANSWER
        out = np.zeros(len(self.labels.starts), bool)
        for begin, end in zip(begins[short].tolist(), ends[short].tolist(), strict=True):
            if all(words.is_blank(token) for token in self.labels.ids[begin:end].tolist()):
                out[owners[begin]] = True
        return out

    def all_trained(self, words: _Words) -> np.ndarray:
        """Which rows have no prompt: every token that is not trained is special."""
        if not self.aligned:
            return np.zeros(len(self.inputs.starts), bool)
        untrained = (self.labels.ids == IGNORED) & ~words.special[np.minimum(self.inputs.ids, len(words.special) - 1)]
        return ~np.logical_or.reduceat(untrained, self.inputs.starts)


class _Words:
    """What single tokens are."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._speller = Speller(tokenizer)
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
        return "".join(piece.text for piece in self._speller.pieces([token]))


def histogram(values: np.ndarray) -> dict[str, list[int]]:
    """At most 20 bars of one round width, but the last one holds the longest in twenty, too.

    Returns:
        ``counts``, and in ``edges`` where each bar begins and, at the end, the largest value plus 1.
    """
    if not len(values):
        return {"edges": [0, 1], "counts": [0]}
    least, most = int(values.min()), int(np.quantile(values, 0.95, method="lower"))
    widths = (size * 10**zeros for zeros in range(18) for size in (1, 2, 5))
    width = next(width for width in widths if most // width - least // width < _BARS)
    bars = np.minimum(values // width, most // width) - least // width
    counts = np.bincount(bars)
    start = least // width * width
    return {
        "edges": [*range(start, start + len(counts) * width, width), int(values.max()) + 1],
        "counts": counts.tolist(),
    }


def _described(pairs: Pairs, used: UsedRows) -> list[dict[str, Any]]:
    """The pairs that are most alike."""
    best = np.argsort(-pairs.index, kind="stable")[:_LISTED]
    return [
        {
            "row": str(used.place(int(pairs.later[at]))),
            "like": str(used.place(int(pairs.earlier[at]))),
            "alike": round(float(pairs.index[at]), 3),
        }
        for at in best
    ]


def _facts(view: View, used: UsedRows) -> dict[str, Any]:
    """Sizes, and what became of the rows."""
    records = [part.records for part in view.parts]
    outcomes = Counter[str]()
    for part, mine in zip(view.parts, records, strict=True):
        for index, name in enumerate(part.store.outcomes):
            outcomes[name] += int((mine["outcome"] == index).sum())
    uncut = np.concatenate([np.zeros(0, np.int64), *(mine["size"] for mine in records)])
    tokens, targets = int(used.tokens.sum()), int(used.targets.sum())
    closed = used.flags & (Flag.OPEN | Flag.ANSWER_CUT) == 0
    return {
        "rows": sum(map(len, records)),
        "used": len(used),
        "left_out": {name: count for name, count in outcomes.items() if count and name != USED},
        "targets_cut": int(used.lost.sum()),
        "flags": {str(flag.name).lower(): int((used.flags & flag != 0).sum()) for flag in Flag},
        "examples": len(view),
        "tokens": tokens,
        "targets": targets,
        "share_trained": targets / tokens if tokens else 0.0,
        "ends_trained": float(closed.mean()) if len(used) else 0.0,
        "lengths": {"rows": _lengths(uncut[uncut > 0]), "examples": _lengths(used.lengths)},
        "sources": _sources(view, used),
        "longest": _longest(view),
        "bad_rows": list(islice(_bad_rows(view), _LISTED_BAD)),
    }


def _lengths(values: np.ndarray) -> dict[str, Any]:
    if not len(values):
        return {**dict.fromkeys(_QUANTILES, 0), "mean": 0.0, "histogram": histogram(values)}
    found_at = np.quantile(values, list(_QUANTILES.values()), method="inverted_cdf")
    quantiles = dict(zip(_QUANTILES, map(int, found_at), strict=True))
    return {**quantiles, "mean": round(float(values.mean()), 1), "histogram": histogram(values)}


def _sources(view: View, used: UsedRows) -> list[dict[str, Any]]:
    """What each file, or dataset of the hub, gives."""
    out: dict[str, dict[str, Any]] = {}
    for at, part in enumerate(view.parts):
        mine, size = used.part == at, len(part.store.files)
        files = part.store.rows["file"][used.number[mine]]
        counts = {
            "rows": np.bincount(part.records["file"], minlength=size),
            "used": np.bincount(files, minlength=size),
            "tokens": np.bincount(files, used.tokens[mine], minlength=size),
            "targets": np.bincount(files, used.targets[mine], minlength=size),
        }
        for index, name in enumerate(part.store.files):
            entry = out.setdefault(name, {"source": name, **dict.fromkeys(counts, 0)})
            for key, values in counts.items():
                entry[key] += int(values[index])
    return list(out.values())


def _longest(view: View) -> list[dict[str, Any]]:
    """The longest rows, before any cut."""
    rows: list[tuple[int, int, int]] = []
    for at, part in enumerate(view.parts):
        tokens = part.records["size"]
        for position in np.argsort(-tokens, kind="stable")[:_LISTED].tolist():
            rows.append((-int(tokens[position]), at, position))
    out = []
    for negative, at, position in sorted(rows)[:_LISTED]:
        chosen, store = view.parts[at].chosen, view.parts[at].store
        row = position if chosen is None else int(chosen[position])
        outcome = store.outcomes[store.rows[row]["outcome"]]
        if outcome != BAD:
            out.append({"row": str(store.place(row)), "tokens": -negative, "outcome": outcome})
    return out


def _bad_rows(view: View) -> Iterator[dict[str, Any]]:
    for part in view.parts:
        for row, error in part.bad_rows():
            yield {"row": str(part.store.place(row)), "message": error.message, "key": error.key}
