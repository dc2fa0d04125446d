"""Reranker: score documents for a query, which the model reads together with each, to sort what a search has found.

Listwise cross-entropy: https://arxiv.org/abs/2101.08751; negatives below the positive's cosine:
https://arxiv.org/abs/2407.15831

A row: ``{"query": "Close a file.", "positive": "def close(file): ...", "negative": "def open(path): ..."}``
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from peftcli.data.findings import Finding
from peftcli.data.rows import Reader, Row, Table, listed, truth_in
from peftcli.data.store import Column, Example, Outcome, View
from peftcli.data.used_rows import Ragged, UsedRows
from peftcli.errors import DataError, ModelError
from peftcli.models.open import OpenBase
from peftcli.tasks import SCORES, settings
from peftcli.tasks.base import (
    Batch,
    Loss,
    OtherModel,
    PredictOptions,
    Task,
    logits_of,
    model_inputs,
    number_in,
    table_of,
)
from peftcli.tasks.classification import correlations
from peftcli.tasks.findings import RANKED as FINDINGS
from peftcli.tasks.mining import Pairs, cached_vectors, nearest_negatives
from peftcli.tasks.parts import Parts, RowScore, join, loss_parts, means
from peftcli.tasks.shown import Label, Shown, Text
from peftcli.tasks.text.answer_inputs import split
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.inputs import TextInputs
from peftcli.tasks.text.sentence_transformers import read_pooling, write_cross_encoder
from peftcli.tasks.text.token_text import TokenRenderer

_QUERY = ("query", "question", "anchor")
_DOCUMENT = ("document", "passage", "text")
_TRUNCATED, _CONTRADICTS = 1, 2
_NONE_FOUND = "no negative was mined"
_HALF = 0.5
_TOP = 10


@dataclass(frozen=True)
class MinedReader(Reader):
    """Knows the negatives of rows that have none."""

    mined: Mapping[tuple[str, str], Sequence[str]]
    """A query and its positive -> the negatives."""


class Reranker(TextInputs, Task[settings.RerankerSettings]):
    """The task ``reranker``."""

    name = "reranker"
    arguments: ClassVar = ("query", "document")
    columns: ClassVar = {**TextInputs.text_columns, "sizes": Column(), "label": Column("float32", (None,))}
    """The tokens of the query with each document, one pair after another; how many each pair has; the label of each."""
    label_columns: ClassVar = ("label",)
    shares = ("query",)
    flags: ClassVar = {"truncated": _TRUNCATED}
    findings_of_flags: ClassVar = {"positive_is_negative": _CONTRADICTS}

    def __init__(self, settings: settings.RerankerSettings, processor: Any, base: OpenBase):
        super().__init__(settings, processor, base)
        if getattr(base.config, "is_encoder_decoder", False):
            message = f"{base.name} is an encoder-decoder; a reranker is an encoder or a decoder with a head"
            raise ModelError(message, key="base_model")
        if settings.labelled and settings.loss == "cross_entropy":
            message = "cross_entropy compares a query's positive with its negatives; these rows have labels"
            raise DataError(message, key="task.loss", hint="Set task.loss to bce or mse.")
        if settings.labelled is False and settings.loss == "mse":
            message = "mse learns the label of a document; these rows have positives and negatives"
            raise DataError(message, key="task.loss", hint="Set task.loss to cross_entropy or bce.")
        if settings.labelled and settings.negatives == "mined":
            raise DataError("rows with a label need no negatives", key="task.negatives", hint="Leave it out.")

    @property
    def packages(self) -> Mapping[str, str]:
        return {"sklearn": "metrics"} if self.settings.loss == "mse" else {}

    @property
    def advice(self) -> Mapping[str, str]:
        return {_NONE_FOUND: "Lower task.mining_margin, or give more rows: other rows' positives become negatives."}

    def fingerprint(self) -> dict[str, Any]:
        mined = {"miner": self._asked.content} if self.settings.negatives == "mined" else {}
        return super().fingerprint() | mined

    def export(self, folder: Path) -> None:
        write_cross_encoder(folder, self.max_length)

    def ask_exported(self, folder: Path, texts: Sequence[str]) -> tuple[list[dict[str, Any]], Any]:
        from sentence_transformers import CrossEncoder

        scores = CrossEncoder(str(folder), device="cpu").predict([(texts[0], text) for text in texts])
        return [{"query": texts[0], "document": text} for text in texts], scores

    # --- rows ---------------------------------------------------------------------------------------------------------

    @property
    def needs_scan(self) -> bool:
        return self.settings.loss is None or self.settings.labelled is None

    @property
    def found(self) -> str:
        rows = "documents with a label" if self.settings.labelled else "positives and negatives"
        return f"{rows}: the loss is {self.settings.loss}"

    def scan(self, tables: Iterable[tuple[Table, Iterator[Row]]]) -> settings.RerankerSettings:
        kinds, between = dict[bool, str](), True
        for table, rows in tables:
            kinds[labelled := _is_labelled(table)] = table.described
            if labelled and self.settings.loss is None:
                name = _labelled_reader(table).names["label"]
                between &= all(_is_between(row.values.get(name)) for row in rows)
        if len(kinds) > 1:
            message = f"{kinds[True]} has documents with a label, and {kinds[False]} positives: no loss fits both"
            raise DataError(message, key="dataset.mix")
        (labelled,) = kinds
        found = ("bce" if between else "mse") if labelled else "cross_entropy"
        loss: Any = self.settings.loss or found
        return replace(self.settings, loss=loss, labelled=labelled)

    def read(self, table: Table) -> Reader:
        if self.settings.labelled:
            return _labelled_reader(table)
        numbered = {name: (name,) for name in table.columns if re.fullmatch(r"negative_\d+", name)}
        columns = {"query": _QUERY, "positive": ("positive",), "negative": ("negative",), **numbered}
        found = table.reader("positives and negatives", optional=("negative",), **columns)
        if self.settings.negatives == "rows" and not _negative_columns(found):
            message = f"no column 'negative' or 'negative_1'; the rows have: {listed(table.columns)}"
            raise DataError(message, file=table.described, key="dataset.columns", hint=_NO_NEGATIVE)
        return found

    def evaluation_task(self) -> Task[Any]:
        if self.settings.negatives == "rows":
            return self
        given = self.settings
        asked = replace(given, num_negatives=given.eval_negatives, mining_margin=None, mining="nearest")
        own = Reranker(asked, self.processor, self.base)
        own.method, own.virtual_tokens, own.open_other = self.method, self.virtual_tokens, self.open_other
        return own

    @property
    def miner(self) -> str:
        """The embedding model that mines negatives.

        Raises:
            DataError: none is named, and the base model is not one.
        """
        if self.settings.miner is None and read_pooling(self.base) is None:
            message = f"names no embedding model, and {self.base.name} is not known to be one"
            raise DataError(message, key="task.miner", hint="Name one: task: {miner: BASE-MODEL-OR-ADAPTER}.")
        return self.settings.miner or self.base.name

    @property
    def _asked(self) -> OtherModel:
        miner = self.miner
        return self.open_other(miner, "feature_extraction")

    def survey(self, reader: Reader, rows: Callable[[], Iterator[Row]], on_rows: Callable[[int, bool], None]) -> Reader:
        if self.settings.negatives == "rows":
            return reader
        pairs = Pairs([], [], set())
        for row in rows():
            if reader.left_out(row) is None:
                _collect(pairs, row, reader)

        def embed(texts: Sequence[str]) -> Iterator[Sequence[float]]:
            answers = self._asked.answers([{"text": text} for text in texts])
            for number, answer in enumerate(answers, start=1):
                on_rows(number, False)
                yield answer["embedding"]

        vectors = partial(cached_vectors, embed=embed, model=self._asked.content, source=f"embeddings by {self.miner}")
        count, margin, spread = (
            self.settings.num_negatives,
            self.settings.mining_margin,
            self.settings.mining == "spread",
        )
        found = nearest_negatives(pairs, vectors, count, margin, spread=spread)
        on_rows(len(pairs.queries), True)
        return MinedReader(reader.name, reader.names, mined=found)

    def encode_row(self, row: Row, reader: Reader) -> Outcome:
        query = reader.text(row, "query", blank=False)
        if self.settings.labelled:
            documents, labels = [reader.text(row, "document", blank=False)], [_label(row, reader, self.settings.loss)]
        else:
            positive, negatives = reader.text(row, "positive", blank=False), _negatives(row, reader)
            if not negatives and isinstance(reader, MinedReader):
                negatives = list(reader.mined.get((query, positive), []))
                if not negatives:
                    return Outcome([], _NONE_FOUND)
            if not negatives and self.settings.loss == "cross_entropy":
                raise row.place.error("has no negative: cross_entropy has nothing to compare with", hint=_NO_NEGATIVE)
            documents, labels = [positive, *negatives], [1.0, *[0.0] * len(negatives)]
        example, size = self._example(row, query, documents, labels)
        flags = _TRUNCATED * (size > example.size)
        flags |= _CONTRADICTS * (not self.settings.labelled and documents[0] in documents[1:])
        return Outcome([example], size=size, flags=flags)

    def _example(
        self, row: Row, query: str, documents: Sequence[str], labels: Sequence[float] = ()
    ) -> tuple[Example, int]:
        """The example of a query with documents, and the tokens that their pairs have uncut."""
        whole = self.processor([query] * len(documents), list(documents), verbose=False)
        size = sum(map(len, whole["input_ids"]))
        cut = self.processor([query] * len(documents), list(documents), truncation=True, max_length=self.max_length)
        pairs = cut["input_ids"]
        if not all(pairs):
            raise row.place.error("holds nothing that the tokenizer knows")
        arrays = {
            "input_ids": np.concatenate(pairs),
            "token_type_ids": np.concatenate(cut.get("token_type_ids") or [[]]),
            "sizes": list(map(len, pairs)),
            "label": list(labels),
        }
        targets = len(documents) if self.settings.loss == "bce" else 1
        return Example(arrays, sum(map(len, pairs)), targets), size

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        """The pairs of all rows, (P, T), padded on the right."""
        labels = np.concatenate([np.asarray(each.arrays["label"], np.float32) for each in examples])
        counts = [len(each.arrays["sizes"]) for each in examples]
        return self.collate_pairs(examples) | {"_labels": torch.from_numpy(labels), "_counts": counts}

    def collate_pairs(self, examples: Sequence[Example]) -> Batch:
        """Put the pairs of examples into one batch."""
        return self.collate_inputs([pair for example in examples for pair in _pairs(example)])

    # --- the model ----------------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        scores = model(**model_inputs(batch)).logits.float()[:, 0]  # (P,)
        rows, labels = scores.split(batch["_counts"]), batch["_labels"]
        if self.settings.loss == "cross_entropy":
            lists = pad_sequence(list(rows), batch_first=True, padding_value=-torch.inf)
            losses = -lists.log_softmax(1)[:, :1]
        elif self.settings.loss == "bce":
            losses = F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
        else:
            losses = (scores - labels) ** 2
        total, outputs = losses.sum(), list[Any]()
        if not model.training:
            each = labels.split(batch["_counts"])
            outputs = [(one.tolist(), own.tolist()) for one, own in zip(rows, each, strict=True)]
        return Loss(total, {"loss": total.detach()}, outputs)

    # --- metrics ------------------------------------------------------------------------------------------------------

    @property
    def _measure(self) -> str:
        """What is measured of rows with labels."""
        return "accuracy" if self.settings.loss == "bce" else "spearman"

    @property
    def reports(self) -> Sequence[str]:
        return ("loss", self._measure) if self.settings.labelled else ("loss", "mrr", "ndcg_at_10", "recall_at_1")

    @property
    def main_metric(self) -> str:
        return self._measure if self.settings.labelled else "mrr"

    @property
    def judges_rows(self) -> bool:
        return self.settings.loss != "mse"

    def constant_metrics(self, view: View) -> dict[str, float]:
        """Of labels the share of the most frequent one; of lists what their order by chance would reach."""
        if self.settings.labelled:
            labels = np.concatenate([store.value("label", at) for store, at in map(view.locate, range(len(view)))])
            good = float((labels >= _HALF).mean())
            return {"accuracy": max(good, 1 - good), "spearman": 0.0}
        counts = np.concatenate([part.store.lengths("sizes")[part.examples] for part in view.parts])
        return {
            "mrr": float(np.mean([(1 / np.arange(1, count + 1)).mean() for count in counts])),
            "recall_at_1": float((1 / counts).mean()),
        }

    def metrics(self, sums: Mapping[str, np.ndarray], outputs: Sequence[Any], num_targets: int) -> dict[str, float]:
        loss = {"loss": float(sums["loss"]) / num_targets}
        if self.settings.labelled and self.settings.loss == "mse":
            scores, labels = _labelled(outputs)
            return loss | {"spearman": correlations(labels, scores)["spearman"]}
        return loss | {name: float(each.mean()) for name, each in self._of_rows(outputs).items()}

    def _of_rows(self, outputs: Sequence[Any]) -> dict[str, np.ndarray]:
        """Each metric of each row, whose mean over rows evaluation reports."""
        if self.settings.labelled:
            scores, labels = _labelled(outputs)
            return {"accuracy": np.where(labels >= _HALF, scores > 0, scores <= 0)}
        # a document that has the positive's score comes before it, and NaN is never right
        ranks = np.array([1 + sum(not each < own for each in others) for (own, *others), _ in outputs])
        gains = np.where(ranks <= _TOP, 1 / np.log2(1 + ranks), 0.0)
        return {"mrr": 1 / ranks, "ndcg_at_10": gains, "recall_at_1": ranks == 1}

    def parts(self, rows: Sequence[RowScore]) -> Parts:
        outputs, ones = [row.outputs[0] for row in rows], np.ones(len(rows))
        if self.settings.loss == "mse":
            return loss_parts(rows)
        found = self._of_rows(outputs)
        right = found["accuracy" if self.settings.labelled else "recall_at_1"]
        return join(loss_parts(rows), means(ones, right, **found))

    # --- what commands ask --------------------------------------------------------------------------------------------

    def show(self, example: Example) -> Shown:
        renderer, parts = TokenRenderer(self.processor), list[Any]()
        pairs, labels = split(example, "input_ids"), np.asarray(example.arrays["label"]).tolist()
        names = ["pair"] if self.settings.labelled else ["positive", *["negative"] * (len(pairs) - 1)]
        for name, ids in zip(names, pairs, strict=True):
            parts.append(Text(renderer.render(ids.tolist(), [IGNORED] * len(ids)), name))
        if self.settings.labelled:
            parts.append(Label(f"{labels[0]:g}"))
        return Shown(parts, {"input_ids": [ids.tolist() for ids in pairs]})

    def findings(self, view: View) -> list[Finding]:
        if self.settings.labelled:
            return []  # equal rows of other labels are found as such
        rows = UsedRows(view)
        positives, negatives, owners = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
        for some, (ids, sizes) in rows.chunks("input_ids", "sizes"):
            hashes = Ragged(ids.values, np.cumsum(sizes.values) - sizes.values).hashes()
            first = np.zeros(len(hashes), bool)
            first[sizes.starts] = True
            positives.append(hashes[first])
            negatives.append(hashes[~first])
            owners.append(sizes.owners()[~first] + some.start)
        right, wrong, of = (np.concatenate([np.zeros(0, np.int64), *each]) for each in (positives, negatives, owners))
        itself = wrong == right[of]  # which the flag of the row says
        mask = np.isin(right, wrong[~itself])
        mask[of[np.isin(wrong, right) & ~itself]] = True
        return rows.findings([(FINDINGS["documents_contradict"], mask)])

    def predict(self, model: nn.Module, rows: Sequence[Row], options: PredictOptions) -> Iterator[dict[str, Any]]:
        """The score of each row's ``document``, or its ``documents``, the best first."""
        table = table_of(rows, {name: each for name, each in options.columns.items() if name in ("query", "document")})
        reader = table.reader(
            "pairs", optional=("document", "documents"), query=_QUERY, document=_DOCUMENT, documents=("documents",)
        )
        examples = list[Example]()
        for row in rows:
            examples.append(self._example(row, reader.text(row, "query"), _documents(row, reader))[0])
        pairs = [pair for example in examples for pair in _pairs(example)]
        scores = iter(
            float(each[0].sigmoid()) for each in logits_of(model, pairs, self.collate_inputs, options.batch_size)
        )
        for row, example in zip(rows, examples, strict=True):
            found = [next(scores) for _ in example.arrays["sizes"]]
            if not _has_several(row, reader):
                yield {"score": found[0]}
                continue
            order = sorted(range(len(found)), key=lambda at: -found[at])
            yield {"ranking": [{"index": at, "score": found[at]} for at in order]}


_NO_NEGATIVE = "Give each row a negative, or let them be found: task: {negatives: mined}."


def _is_labelled(table: Table) -> bool:
    there = {*table.columns, *table.source.columns}
    return "positive" not in there and bool({*SCORES} & there)


def _labelled_reader(table: Table) -> Reader:
    return table.reader("labelled documents", query=_QUERY, document=_DOCUMENT, label=SCORES)


def _is_between(label: Any) -> bool:
    """Whether a label is no number outside of [0, 1]."""
    value = number_in(label)
    return not isinstance(value, int | float) or 0 <= value <= 1


def _negative_columns(reader: Reader) -> list[str]:
    return [column for column in reader.names if column.startswith("negative")]


def _negatives(row: Row, reader: Reader) -> list[str]:
    """The negatives of a row: texts, lists of texts, or nothing, in columns of their own."""
    found = list[str]()
    for column in _negative_columns(reader):
        name = reader.names[column]
        value = row.values.get(name)
        for each in value if isinstance(value, list) else [value] if value not in (None, "") else []:
            if not isinstance(each, str) or not each.strip():
                raise row.place.error(f"expected a text, found {each!r:.60}", key=name)
            found.append(each)
    return found


def _collect(pairs: Pairs, row: Row, reader: Reader) -> None:
    """Add a row's texts to those of which negatives are mined; not of one that cannot be used."""
    try:
        query, positive = (reader.text(row, name, blank=False) for name in ("query", "positive"))
        own = _negatives(row, reader)
    except DataError:
        return
    pairs.documents.update(own)
    pairs.queries.append(query)
    pairs.positives.append(positive)


def _has_several(row: Row, reader: Reader) -> bool:
    return "documents" in reader.names and row.values.get(reader.names["documents"]) is not None


def _documents(row: Row, reader: Reader) -> list[str]:
    """The documents of a row to answer."""
    if not _has_several(row, reader):
        if "document" not in reader.names:
            raise row.place.error(f"no 'document' or 'documents'; the row has: {listed(row.values)}")
        return [reader.text(row, "document")]
    value = reader.value(row, "documents")
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise row.place.error(f"expected a list of texts, found {value!r:.60}", key=reader.names["documents"])
    return value


def _label(row: Row, reader: Reader, loss: str | None) -> float:
    """The label of a document: for bce from 0 to 1, or true or false."""
    given = reader.value(row, "label")
    truth = truth_in(given)
    value = float(truth) if truth is not None else number_in(given)
    if not isinstance(value, int | float) or not np.isfinite(value):
        raise row.place.error(f"expected a number, found {given!r:.60}", key=reader.names["label"])
    if loss == "bce" and not 0 <= value <= 1:
        hint = "Where labels are scores of another range, set task.loss to mse."
        raise row.place.error(
            f"expected 0, 1 or a number between, found {given!r:.60}", key=reader.names["label"], hint=hint
        )
    return float(value)


def _pairs(example: Example) -> list[Example]:
    """Each pair of an example as an example."""
    ids = split(example, "input_ids")
    of_segments = len(example.arrays["token_type_ids"]) > 0
    kinds = split(example, "token_type_ids") if of_segments else [np.zeros(0, np.int8)] * len(ids)
    return [
        Example({"input_ids": own, "token_type_ids": kind}, len(own), 1) for own, kind in zip(ids, kinds, strict=True)
    ]


def _labelled(outputs: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The score and the label of each row: (N,) each."""
    scores, labels = (np.array([each[0] for each in some]) for some in zip(*outputs, strict=True))
    return scores, labels


TASK = Reranker
