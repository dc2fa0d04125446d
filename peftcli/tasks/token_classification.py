"""Token classification: a tag for each word, as the names in a text or parts of speech.

A row: ``{"tokens": ["Ada", "lives", "in", "Turin"], "ner_tags": ["B-PER", "O", "O", "B-LOC"]}``, or a text and its
entities: ``{"text": "Ada lives in Turin", "entities": [{"start": 13, "end": 18, "label": "LOC"}]}``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from peftcli.data.findings import Finding
from peftcli.data.rows import Row, Table, count_of, listed, of_all_rows, shortened
from peftcli.data.store import Column, Example, Outcome, View
from peftcli.errors import DataError
from peftcli.models.open import OpenBase
from peftcli.tasks import TAGS, TOKENS, settings
from peftcli.tasks.base import Batch, Loss, PredictOptions, Task, logits_of, model_inputs, table_of
from peftcli.tasks.findings import CLASSES as FINDINGS
from peftcli.tasks.labels import (
    UNBALANCED,
    LabelReader,
    LabelScan,
    Tables,
    describe_counts,
    index_of,
    missing_classes,
    places_of,
)
from peftcli.tasks.parts import Parts, RowScore, f1, join, loss_parts, mean_of_some, means, ratio
from peftcli.tasks.shown import Description, Shown, Text
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.inputs import TextInputs
from peftcli.tasks.text.token_ids import padded
from peftcli.tasks.text.token_text import TokenRenderer
from peftcli.tasks.text.words import OUTSIDE, Words, as_iob2, joined_words, owners, tags_of, words_of

_TRUNCATED, _CONVERTED, _PARTS = 1, 2, 4
_TEXTS = ("text", "sentence")
_SPANS = ("entities", "spans")


class TokenClassification(TextInputs, Task[settings.TokenClassificationSettings]):
    """The task ``token_classification``."""

    name = "token_classification"
    arguments = ("text",)
    columns: ClassVar = {**TextInputs.text_columns, "word_of": Column(), "tags": Column()}
    label_columns = ("tags",)
    shares = ("tokens", "text")
    flags: ClassVar = {"truncated": _TRUNCATED}
    findings_of_flags: ClassVar = {"converted_tags": _CONVERTED, "parts_of_words": _PARTS}
    packages: ClassVar = {"seqeval": "metrics", "sklearn": "metrics"}

    def __init__(self, settings: settings.TokenClassificationSettings, processor: Any, base: OpenBase):
        super().__init__(settings, processor, base)
        self.labels = tuple(settings.labels or ())
        """Names of the tags, in the order of the model's outputs."""
        self._index = index_of(self.labels, "tag", by_number=settings.labels_by_number)

    @property
    def names(self) -> Sequence[str]:
        """The types of entities, or the tags where they mark no entities."""
        return _types(self.labels) if self.settings.scheme == "iob2" else self.labels

    @property
    def found(self) -> str:
        count = len(self.names)
        kind = f"entities of {count_of(count, 'type')}" if self.settings.scheme == "iob2" else count_of(count, "tag")
        numbers = all(map(str.isdecimal, self.labels))
        return f"{kind}: {listed(self.names)}{'; if they mark entities, name them in task.labels' * numbers}"

    @property
    def needs_scan(self) -> bool:
        kind = self.settings.scheme
        return not self.labels or kind is None or (kind == "iob2" and not all(map(settings.is_iob2, self.labels)))

    def scan(self, tables: Tables) -> settings.TokenClassificationSettings:
        scan, seen = LabelScan(), dict[str, None]()
        for tags, _ in scan.labels(tables, self.read, lambda row, reader: tags_of(words_of(row, reader), row, reader)):
            seen |= dict.fromkeys(tag for tag in tags if tag is not None)
        declared, spans = scan.declared, any("entities" in reader.names for reader in scan.readers)
        given = list(self.labels)
        numbered = bool(given and seen) and seen.keys() <= places_of(given).keys()
        if numbered and not any(map(settings.is_iob2, given)):
            message = "the tags of the training rows are numbers, and types of entities have none"
            hint = "Name the tags in the order of their numbers, as in [O, B-PER, I-PER], or set task.scheme: none."
            raise DataError(message, key="task.labels", hint=hint)
        found = given if numbered else declared or list(seen)
        converted = list(dict.fromkeys(map(as_iob2, found)))
        is_iob2 = all(map(settings.is_iob2, converted)) and any(tag.startswith("B-") for tag in found)
        scheme = self.settings.scheme or ("iob2" if is_iob2 or spans else "none")
        own, found = found, converted if scheme == "iob2" else found
        if scan.error and not seen:
            raise of_all_rows(scan.error)
        if spans and scheme == "none":
            raise DataError("the rows hold entities, whose tags are B- and I- of each type", key="task.scheme")
        if scheme == "iob2" and (types := [tag for tag in given if not settings.is_iob2(tag)]):
            if len(types) < len(given):
                message = f"{types[0]!r} is not a tag of the scheme iob2, unlike the others"
                raise DataError(message, key="task.labels", hint="Name the types of entities alone, as in [PER, ORG].")
            given = _with_prefixes(given)
        if scheme == "iob2" and not given and (others := [tag for tag in own if not settings.is_iob2(as_iob2(tag))]):
            raise DataError(
                f"the training rows have the tag {shortened(others[0])}, which is not O, B-TYPE or I-TYPE",
                key="task.scheme",
            )
        labels = given or (_with_prefixes(_types(found)) if spans else found)
        if len(labels) < 2:
            what = f"all words have the tag {labels[0]!r}" if labels else "no word has a tag"
            message = f"in the training rows {what}; the model needs two tags"
            raise DataError(message, key="dataset.train", hint=scan.hint)
        by_number = self.settings.labels_by_number and (
            labels == list(self.labels) or (scan.all_declare and labels == declared)
        )
        return replace(self.settings, labels=labels, scheme=scheme, labels_by_number=by_number)

    def read(self, table: Table, *, labelled: bool = True) -> LabelReader:
        renamed, there = table.source.columns, {*table.columns}
        tagged = "tokens" in there or ({"words", *TAGS} & there and not {*_TEXTS} & there)
        tokens = "tokens" in renamed or ("text" not in renamed and tagged)
        inputs, label = ({"tokens": TOKENS}, "tags") if tokens else ({"text": _TEXTS}, "entities")
        columns = {**inputs, label: TAGS if tokens else _SPANS}
        found = table.reader("tags" if tokens else "entities", optional=() if labelled else (label,), **columns)
        classes = table.class_names().get(found.names.get(label, ""), ()) if labelled else ()
        return LabelReader(found.name, found.names, tuple(classes))

    def encode_row(self, row: Row, reader: Any) -> Outcome:
        words, example, size = self._example(words_of(row, reader), joins="text" in reader.names)
        own, whole = tags_of(words, row, reader)
        named = [tag and as_iob2(tag) for tag in own] if self.settings.scheme == "iob2" else own
        tags = [self._target(*both, row, reader) for both in zip(named, own, strict=True)]
        if not words.spans or not example.size:
            raise row.place.error("holds no words")
        counted = self._labels(example.arrays["word_of"], tags)
        read = set(example.arrays["word_of"])
        kept = max(read) + 1 if size > example.size else len(tags)
        # words of these that have no piece were not cut: the tokenizer drops what they hold
        tags = [IGNORED if at < kept and at not in read else tag for at, tag in enumerate(tags)]
        example.arrays["tags"], example.num_targets = tags, sum(label != IGNORED for label in counted)
        lost = sum(tag != IGNORED and at not in read for at, tag in enumerate(tags)) if size > example.size else 0
        if not example.num_targets:
            return Outcome([], "no word has a tag", size)
        flags = _TRUNCATED * (size > example.size) | _CONVERTED * (named != own) | _PARTS * (not whole)
        return Outcome([example], size=size, lost=lost, flags=flags)

    def _example(self, words: Words, *, joins: bool) -> tuple[Words, Example, int]:
        """The words of a row, its example without their tags, and how many tokens the row has before any cut.

        ``joins``: words that share a piece are one.
        """
        if self.processor.is_fast:
            found = self.processor(words.text, return_offsets_mapping=True, verbose=False)
            size = len(found["input_ids"])
            words = joined_words(words, found["offset_mapping"]) if joins else words
            if size > self.max_length:
                found = self.processor(
                    words.text, return_offsets_mapping=True, truncation=True, max_length=self.max_length
                )
            owner = owners(words)
            word_of = [max(owner[start:end], default=-1) for start, end in found["offset_mapping"]]
        else:
            split, ids_of = self.processor.tokenize, self.processor.convert_tokens_to_ids
            pieces = [list(ids_of(split(words.text[start:end]))) for start, end in words.spans]
            owner = [at for at, each in enumerate(pieces) for _ in each]
            size = len(owner) + self.processor.num_special_tokens_to_add()
            room = self.max_length - self.processor.num_special_tokens_to_add()
            ids = [piece for each in pieces for piece in each][:room]
            found = self.processor.prepare_for_model(ids, return_special_tokens_mask=True)
            special, left = found["special_tokens_mask"], iter(owner)
            word_of = [-1 if is_special else next(left) for is_special in special]
        arrays = {
            "input_ids": found["input_ids"],
            "token_type_ids": found.get("token_type_ids", []),
            "word_of": word_of,
            "tags": [],
        }
        return words, Example(arrays, len(found["input_ids"]), 0), size

    def _target(self, tag: str | None, own: str | None, row: Row, reader: LabelReader) -> int:
        """The number of a tag, which is ``own`` in the row; ``IGNORED`` for a word that has none."""
        if tag is None:
            return IGNORED
        if tag not in self._index:
            converted = f" ({shortened(tag)} in IOB2)" if tag != own else ""
            raise row.place.error(
                f"the tag {shortened(own)}{converted} is not one of {listed(self.labels)}",
                key=reader.names.get("tags") or reader.names["entities"],
                hint="The tags are those of the training rows, unless task.labels names them.",
            )
        return self._index[tag]

    def _labels(self, word_of: Sequence[int], tags: Sequence[int]) -> list[int]:
        """What each piece of a row is trained to be: the tag of its word, or ``IGNORED``."""
        labels, last = list[int](), -1
        for word in word_of:
            if word < 0:
                labels.append(IGNORED)
            elif word != last:
                labels.append(tags[word])
            else:
                labels.append(self._inside(tags[word]) if self.settings.label_all_pieces else IGNORED)
            last = word
        return labels

    def _inside(self, tag: int) -> int:
        """The tag of the pieces after the first of a word: I-PER where the word's is B-PER."""
        name = self.labels[tag] if tag != IGNORED else ""
        return self._index.get(f"I-{name[2:]}", tag) if name.startswith("B-") else tag

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        """Pad on the right.

        For metrics there are ``_first`` and ``_tags`` (B, W): each word's first piece, -1 if it was cut, and its tag.
        """
        word_of, tags = ([np.asarray(each.arrays[name]).tolist() for each in examples] for name in ("word_of", "tags"))
        first = [_first_pieces(pieces, len(wanted)) for pieces, wanted in zip(word_of, tags, strict=True)]
        labels = [self._labels(pieces, wanted) for pieces, wanted in zip(word_of, tags, strict=True)]
        return self.collate_inputs(examples) | {
            "labels": padded(labels, IGNORED),
            "_first": padded(first, -1),
            "_tags": padded(tags, IGNORED),
        }

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        inputs = {name: value for name, value in model_inputs(batch).items() if name != "labels"}
        logits, counts = model(**inputs).logits, batch["labels"] != IGNORED  # (B, T, C), (B, T)
        total = F.cross_entropy(logits[counts].float(), batch["labels"][counts], reduction="sum")
        outputs = () if model.training else self._outputs(logits.detach(), batch["_first"], batch["_tags"])
        return Loss(total, {"loss": total.detach()}, outputs)

    def _outputs(self, logits: torch.Tensor, first: torch.Tensor, tags: torch.Tensor) -> list[tuple[Any, Any]]:
        """The tag and the prediction of each word that has a tag. Of a word that was cut, O is predicted, or -1."""
        found = torch.where(first >= 0, logits.argmax(-1).gather(1, first.clamp(min=0)), self._index.get(OUTSIDE, -1))
        counts = tags != IGNORED
        return [(tags[at][counts[at]].tolist(), found[at][counts[at]].tolist()) for at in range(len(tags))]

    @property
    def reports(self) -> Sequence[str]:
        if self.settings.scheme == "none":
            return ("loss", "accuracy", "macro_f1")
        return ("loss", "accuracy", "precision", "recall", "f1", *(f"f1_{name}" for name in self.names))

    @property
    def main_metric(self) -> str:
        return "accuracy" if self.settings.scheme == "none" else "f1"

    def constant_metrics(self, view: View) -> dict[str, float]:
        """The share of the most frequent tag, and an F1 of 0 where all words are outside of entities."""
        counts = self._counts(view)
        share = max(counts.values()) / counts.total()
        return {"accuracy": share, "f1": 0.0, "loss": math.log(len(self.labels))}

    def metrics(self, sums: Mapping[str, np.ndarray], outputs: Sequence[Any], num_targets: int) -> dict[str, float]:
        loss = {"loss": float(sums["loss"]) / num_targets}
        wanted, found = zip(*outputs, strict=True)
        pairs = [pair for one, other in outputs for pair in zip(one, other, strict=True)]
        accuracy = sum(one == other for one, other in pairs) / len(pairs)
        if self.settings.scheme == "none":
            from sklearn.metrics import f1_score

            tags = sorted({tag for pair in pairs for tag in pair if tag >= 0})  # words that were cut are no class
            f1 = f1_score(*zip(*pairs, strict=True), labels=tags, average="macro", zero_division=0)
            return loss | {"accuracy": accuracy, "macro_f1": float(f1)}
        from seqeval.metrics import classification_report

        names = [
            [[self.labels[tag] if tag >= 0 else OUTSIDE for tag in row] for row in rows] for rows in (wanted, found)
        ]
        if all(tag == OUTSIDE for row in names[0] for tag in row):  # seqeval defines none of these then
            right = float(all(tag == OUTSIDE for row in names[1] for tag in row))
            return loss | dict.fromkeys(("precision", "recall", "f1"), right) | {"accuracy": accuracy}
        report = classification_report(*names, output_dict=True, zero_division=0)
        overall = report["micro avg"]
        return (
            loss
            | {"precision": overall["precision"], "recall": overall["recall"], "f1": overall["f1-score"]}
            | {"accuracy": accuracy}
            | {f"f1_{name}": report[name]["f1-score"] for name in _types(self.labels) if name in report}
        )

    def parts(self, rows: Sequence[RowScore]) -> Parts:
        """Count right, wanted and found words of each tag, or entities of each type, in each row."""
        pairs = [[pair for one, other in row.outputs for pair in zip(one, other, strict=True)] for row in rows]
        hits = np.array([sum(one == other for one, other in each) for each in pairs])
        words = np.array(list(map(len, pairs)))
        whole = join(loss_parts(rows), means(words, hits == words, accuracy=hits))
        is_plain = self.settings.scheme == "none"
        places: dict[Any, int] = {at if is_plain else name: at for at, name in enumerate(self.names)}
        counted: list[list[list[Any]]]
        if is_plain:
            counted = [[list(enumerate(side)) for side in zip(*each, strict=True)] for each in pairs]
        else:
            counted = [[self._entities_of(row, side) for side in (0, 1)] for row in rows]
        counts = np.zeros((len(rows), 3, len(places)))
        for at, (wanted, found) in enumerate(counted):
            for kind, those in enumerate((set(wanted) & set(found), wanted, found)):
                for one in those:
                    if one[-1] in places:  # words that were cut off have no place
                        counts[at, kind, places[one[-1]]] += 1
        return join(whole, Parts(counts.reshape(len(rows), -1), self._metrics_of_counts))

    def _entities_of(self, row: RowScore, side: int) -> list[tuple[int, int, int, str]]:
        """The entities that the tags, or the predictions, of a row mark, as seqeval finds them."""
        from seqeval.metrics.sequence_labeling import get_entities

        tags = [[self.labels[tag] if tag >= 0 else OUTSIDE for tag in each[side]] for each in row.outputs]
        return [(at, first, last, name) for at, each in enumerate(tags) for name, first, last in get_entities(each)]

    def _metrics_of_counts(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        right, wanted, found = np.split(sums, 3, axis=1)
        if self.settings.scheme == "none":
            return {"macro_f1": mean_of_some(f1(right, wanted, found))}
        totals = [each.sum(axis=1) for each in (right, wanted, found)]
        whole = {
            "precision": ratio(totals[0], totals[2], empty=0.0),
            "recall": ratio(totals[0], totals[1], empty=0.0),
            "f1": np.nan_to_num(f1(*totals)),
        }
        empty, none = totals[1] == 0, (totals[2] == 0).astype(np.float64)
        whole = {name: np.where(empty, none, value) for name, value in whole.items()}
        each = np.where(empty[:, None], np.nan, f1(right, wanted, found))
        return whole | {f"f1_{name}": each[:, at] for at, name in enumerate(self.names)}

    def show(self, example: Example) -> Shown:
        ids, word_of = (np.asarray(example.arrays[name]).tolist() for name in ("input_ids", "word_of"))
        named = [self.labels[tag] if tag != IGNORED else None for tag in np.asarray(example.arrays["tags"]).tolist()]
        labels = [""] * len(ids)
        for name, start, end in _entities([tag or OUTSIDE for tag in named], self.settings.scheme == "iob2"):
            pieces = [at for at, word in enumerate(word_of) if start <= word <= end]
            for at in range(min(pieces, default=0), max(pieces, default=-1) + 1):
                labels[at] = name
        renderer, at, tokens = TokenRenderer(self.processor), 0, []
        for token in renderer.render(ids, [IGNORED] * len(ids)):
            tokens.append(replace(token, trained=bool(labels[at]), label=labels[at]))
            at += len(token.ids)
        return Shown([Text(tokens, "text", self.names)], {"input_ids": ids, "text": renderer.text(ids), "tags": named})

    def _counts(self, view: View) -> Counter[str]:
        found = Counter[str]()
        for at in range(len(view)):
            store, number = view.locate(at)
            for tag in store.value("tags", number).tolist():
                if tag != IGNORED:
                    found[self.labels[tag]] += 1
        return found

    def describe(self, view: View) -> Description:
        counts = self._counts(view)
        return describe_counts("tags", {name: counts[name] for name in self.labels}, max(1, counts.total()))

    def findings(self, view: View) -> list[Finding]:
        counts = self._counts(view)
        total, kind = counts.total(), FINDINGS["unbalanced_classes"]
        missing = [name for name in self.labels if not name.startswith("I-") and not counts[name]]
        return missing_classes(missing, total, unit="words") + [
            kind.finding(count, total, (), more=f": {name!r}", unit="words")
            for name, count in counts.items()
            if count >= UNBALANCED * total
        ]

    def predict(self, model: nn.Module, rows: Sequence[Row], options: PredictOptions) -> Iterator[dict[str, Any]]:
        reader = self.read(table_of(rows, options.columns), labelled=False)
        joins = "text" in reader.names
        words, examples, _ = zip(*(self._example(words_of(row, reader), joins=joins) for row in rows), strict=True)
        read = [at for at in range(len(rows)) if examples[at].size]
        logits = logits_of(model, [examples[at] for at in read], self.collate_inputs, options.batch_size)
        scores = dict(zip(read, logits, strict=True))  # (T, C)
        for at in range(len(rows)):
            yield self._answer(words[at], examples[at], scores[at].softmax(-1) if at in scores else None)

    def _answer(self, words: Words, example: Example, scores: torch.Tensor | None) -> dict[str, Any]:
        tags, read, sure = [OUTSIDE] * len(words.spans), list[int](), list[float]()
        for at, piece in enumerate(_first_pieces(example.arrays["word_of"], len(words.spans))):
            if piece >= 0 and scores is not None:  # a word without a piece is no end of an entity
                best = int(scores[piece].argmax())
                tags[at] = self.labels[best]
                read.append(at)
                sure.append(float(scores[piece, best]))
        entities = [
            {
                "type": name,
                "start": words.spans[read[first]][0],
                "end": words.spans[read[last]][1],
                "text": words.text[words.spans[read[first]][0] : words.spans[read[last]][1]],
                "score": sum(sure[first : last + 1]) / (last + 1 - first),
            }
            for name, first, last in _entities([tags[at] for at in read], self.settings.scheme == "iob2")
        ]
        return {"entities": entities, "tags": tags, "words": [words.text[start:end] for start, end in words.spans]}


def _entities(tags: Sequence[str], iob2: bool) -> list[tuple[str, int, int]]:
    """The entities that tags mark: type, first and last word. An I- tag after another type begins an entity."""
    found = list[tuple[str, int, int]]()
    for at, tag in enumerate(tags):
        if tag == OUTSIDE:
            continue
        name = tag[2:] if iob2 else tag
        goes_on = found and found[-1][2] == at - 1 and found[-1][0] == name and not (iob2 and tag.startswith("B-"))
        if goes_on:
            found[-1] = (name, found[-1][1], at)
        else:
            found.append((name, at, at))
    return found


def _types(tags: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(tag[2:] for tag in tags if tag != OUTSIDE))


def _with_prefixes(types: Sequence[str]) -> list[str]:
    return [OUTSIDE, *(f"{prefix}-{name}" for name in types for prefix in "BI")]


def _first_pieces(word_of: Sequence[int], count: int) -> list[int]:
    """The first piece of each of ``count`` words; -1: it has none."""
    first = [-1] * count
    for at in range(len(word_of) - 1, -1, -1):
        if word_of[at] >= 0:
            first[word_of[at]] = at
    return first


TASK = TokenClassification
