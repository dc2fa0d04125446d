"""Question answering: find the answer to a question in a text, or that it is not there (arXiv:1606.05250).

A row: ``{"question": "Where does Ada live?", "context": "Ada lives in Turin.", "answers": {"text": ["Turin"],
"answer_start": [13]}}``. A context that is too long becomes several examples, windows that overlap.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import regex
import torch
import torch.nn.functional as F
from torch import nn

from peftcli.data.rows import Reader, Row, Table, shortened
from peftcli.data.store import Column, Example, Outcome, View
from peftcli.errors import DataError
from peftcli.models.open import OpenBase
from peftcli.tasks import settings
from peftcli.tasks.base import Batch, Loss, PredictOptions, Task, logits_of, model_inputs, scores_of, table_of
from peftcli.tasks.parts import Parts, RowScore, join, loss_parts, means
from peftcli.tasks.shown import Description, Label, Shown, Text
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.inputs import TextInputs
from peftcli.tasks.text.token_text import TokenRenderer

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_MARKS = regex.compile(r"\p{M}*")
"""Accents and vowel signs after a letter, which uncased tokenizers strip."""
_NO_PLACE = -1


@dataclass(frozen=True)
class ScoredSpan:
    """A place in a context that may be the answer."""

    score: float
    """The sum of its start's and its end's logit."""
    start: int
    """Its first character, and in ``end`` the one past the last; both 0: the answer is not there."""
    end: int


_SEVERAL = 1
"""The flag of a row whose answer was looked up and has several places."""


class QuestionAnswering(TextInputs, Task[settings.QuestionAnsweringSettings]):
    """The task ``question_answering``."""

    name = "question_answering"
    arguments = ("question", "context")
    columns: ClassVar = {
        **TextInputs.text_columns,
        "places": Column(shape=(None, 2)),
        "answer": Column(shape=(2,)),
        "row": Column("str"),
        "context": Column("str"),
        "answers": Column("str"),
    }
    findings_of_flags: ClassVar = {"several_places": _SEVERAL}
    reports = ("loss", "exact_match", "f1")
    main_metric = "f1"
    label_columns = ("answer",)
    shares = ("context",)

    def __init__(self, settings: settings.QuestionAnsweringSettings, processor: Any, base: OpenBase):
        if not processor.is_fast:
            raise DataError("needs a tokenizer that knows places in the text (a fast one)", key="base_model")
        super().__init__(settings, processor, base)

    @property
    def needs_scan(self) -> bool:
        return self.settings.unanswerable is None

    @property
    def found(self) -> str:
        without = "some questions have no answer in their context"
        return without if self.settings.unanswerable else "each question has an answer in its context"

    def scan(self, tables: Iterable[tuple[Table, Iterator[Row]]]) -> settings.QuestionAnsweringSettings:
        for table, rows in tables:
            reader = self.read(table)
            for row in rows:
                with suppress(DataError):
                    if not _answers(row, reader):
                        return replace(self.settings, unanswerable=True)
        return replace(self.settings, unanswerable=False)

    def read(self, table: Table, *, labelled: bool = True) -> Reader:
        found = table.reader(
            "questions",
            optional=() if labelled else ("answers",),
            question=("question",),
            context=("context",),
            answers=("answers", "answer"),
        )
        name = found.names.get("answers", "")
        without = isinstance(table.first.get(name), str)
        return (
            replace(found, implied=f"{name}, texts without their place, which is looked up in context")
            if without
            else found
        )

    def encode_row(self, row: Row, reader: Reader) -> Outcome:
        answers = _answers(row, reader)
        if not answers and self.settings.unanswerable is False:
            raise row.place.error("has no answer; task.unanswerable is false", key=reader.names["answers"])
        examples = self._windows(row, reader)
        wanted = _read_part(examples, *answers[0]) if answers else None
        for example in examples:
            example.arrays["answers"] = json.dumps([text for _, text in answers])
            example.arrays["answer"] = _target(example, wanted, self._none(example))
        if answers and all(example.arrays["answer"] == (self._none(example),) * 2 for example in examples):
            message = f"no window of {self.max_length} tokens holds all of the answer {shortened(answers[0][1])}"
            hint = "Raise max_length or task.stride, or shorten the answer."
            raise row.place.error(message, key=reader.names["answers"], hint=hint)
        flags = _SEVERAL * _has_several_places(row, reader)
        return Outcome(examples, size=sum(example.size for example in examples), flags=flags)

    def _windows(self, row: Row, reader: Reader) -> list[Example]:
        """The examples of a row without its answer: the question, and as much of the context as there is room for."""
        question, context = (reader.text(row, name, blank=False) for name in ("question", "context"))
        asked = self.processor(question.lstrip(), add_special_tokens=False, verbose=False)["input_ids"]
        room = self.max_length - len(asked) - self.processor.num_special_tokens_to_add(pair=True)
        found: Any = {"input_ids": []}
        if room > 0:
            found = self.processor(
                question.lstrip(),
                context,
                truncation="only_second",
                max_length=self.max_length,
                stride=min(self.settings.stride, room - 1),
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                verbose=False,
            )
        if len(found["input_ids"]) != 1 and room <= self.settings.stride:
            message = f"the question leaves {max(0, room)} of {self.max_length} tokens for the context"
            raise row.place.error(message, key=reader.names["question"], hint="Raise max_length or lower task.stride.")
        examples = []
        for number, ids in enumerate(found["input_ids"]):
            parts, offsets = found.sequence_ids(number), found["offset_mapping"][number]
            places = [
                place if part == 1 else (_NO_PLACE, _NO_PLACE) for part, place in zip(parts, offsets, strict=True)
            ]
            kinds = found["token_type_ids"][number] if "token_type_ids" in found else []
            arrays = {
                "input_ids": ids,
                "token_type_ids": kinds,
                "places": places,
                "answer": (0, 0),
                "row": f"{row.place.source} row {row.place.number}",
                "context": context,
                "answers": "",
            }
            examples.append(Example(arrays, len(ids), 1))
        return examples

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        batch = self.collate_inputs(examples)
        answers = torch.tensor(np.array([each.arrays["answer"] for each in examples]), dtype=torch.long)  # (B, 2)
        batch |= {"start_positions": answers[:, 0], "end_positions": answers[:, 1]}
        return batch if training else batch | {"_examples": examples}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The mean of the cross-entropies of start and end over the tokens of a row; padding does not take part."""
        inputs = {name: value for name, value in model_inputs(batch).items() if "positions" not in name}
        scores = scores_of(model(**inputs)).float()  # (B, T, 2)
        scores = scores.masked_fill(batch["attention_mask"][..., None] == 0, torch.finfo(torch.float32).min)
        wanted = torch.stack([batch["start_positions"], batch["end_positions"]], dim=-1)  # (B, 2)
        total = F.cross_entropy(scores, wanted, reduction="sum") / 2
        outputs = [] if model.training else self._outputs(scores.detach().cpu(), batch["_examples"])
        return Loss(total, {"loss": total.detach()}, outputs)

    def _outputs(self, scores: torch.Tensor, examples: Sequence[Example]) -> list[tuple[Any, ...]]:
        """Of each window: its question, the answers that would be right, the context, its likeliest answers."""
        return [
            (_question(each), each.arrays["answers"], each.arrays["context"], self._likeliest(each, score))
            for each, score in zip(examples, scores, strict=True)
        ]

    def _none(self, example: Example) -> int:
        """The token that says that the answer is not there: the class token, else the first one."""
        ids = np.asarray(example.arrays["input_ids"]).tolist()
        return ids.index(self.processor.cls_token_id) if self.processor.cls_token_id in ids else 0

    def _likeliest(self, example: Example, scores: torch.Tensor) -> list[ScoredSpan]:
        """The likeliest places in a window, the best first, and at the end that the answer is not there.

        ``scores`` are (T, 2), or longer by padding.
        """
        places = np.asarray(example.arrays["places"])
        starts, ends = scores[: len(places), 0].numpy(), scores[: len(places), 1].numpy()
        cls = self._none(example)
        none = ScoredSpan(float(starts[cls] + ends[cls]), 0, 0)
        inside = np.flatnonzero(places[:, 0] >= 0)
        best = [inside[np.argsort(-each[inside], kind="stable")][: self.settings.n_best] for each in (starts, ends)]
        found = [
            ScoredSpan(float(starts[first] + ends[last]), int(places[first, 0]), int(places[last, 1]))
            for first in best[0]
            for last in best[1]
            if 0 <= last - first < self.settings.max_answer_length
        ]
        found.sort(key=lambda each: -each.score)
        return [*found[: self.settings.n_best], none]

    def _answer(self, context: str, windows: Sequence[Sequence[ScoredSpan]]) -> dict[str, Any]:
        """The answer to a question, from the likeliest places of all windows of its context."""
        # a window without the answer says so, whatever the others say
        none = min((found[-1] for found in windows), key=lambda each: each.score)
        found = sorted((each for window in windows for each in window[:-1]), key=lambda each: -each.score)
        found = found[: self.settings.n_best]
        candidates = [*found, none] if self.settings.unanswerable or not found else found
        best = found[0] if found else none
        if self.settings.unanswerable and none.score - best.score > self.settings.null_threshold:
            best = none
        shares = np.exp(np.array([each.score for each in candidates]) - max(each.score for each in candidates))
        share = float(shares[candidates.index(best)] / shares.sum())
        marks = _MARKS.match(context, best.end)
        end = marks.end() if marks and best is not none else best.end
        text = context[best.start : end]  # some tokenizers count the blank before a word, or have tokens of blanks
        start = best.start + len(text) - len(text.lstrip()) if text.strip() else 0
        return {"answer": text.strip(), "start": start, "end": start + len(text.strip()), "score": share}

    def metrics(self, sums: Mapping[str, np.ndarray], outputs: Sequence[Any], num_targets: int) -> dict[str, float]:
        exact, f1 = (float(np.mean(each)) for each in zip(*self._scores(outputs), strict=True))
        return {"loss": float(sums["loss"]) / num_targets, "exact_match": exact, "f1": f1}

    def _scores(self, outputs: Sequence[Any]) -> list[tuple[float, float]]:
        """Exact match and F1 of each question, from the outputs of all windows."""
        windows, known = dict[Any, list[Any]](), dict[Any, list[str]]()
        for question, answers, context, found in outputs:
            windows.setdefault((question, context), []).append(found)
            known[question, context] = json.loads(answers)
        return [
            score_of(self._answer(context, windows[question, context])["answer"], answers)
            for (question, context), answers in known.items()
        ]

    def parts(self, rows: Sequence[RowScore]) -> Parts:
        scores = [self._scores(row.outputs) for row in rows]
        exact, f1 = (np.array([sum(each[at] for each in some) for some in scores]) for at in (0, 1))
        questions = np.array(list(map(len, scores)))
        return join(loss_parts(rows), means(questions, exact == questions, exact_match=exact, f1=f1))

    def show(self, example: Example) -> Shown:
        ids, (first, last) = np.asarray(example.arrays["input_ids"]).tolist(), example.arrays["answer"]
        there = first != self._none(example) or last != first
        labels = [0 if there and first <= at <= last else IGNORED for at in range(len(ids))]
        renderer = TokenRenderer(self.processor)
        answers = json.loads(example.arrays["answers"])
        text = "(not in this context)" if not answers else answers[0] if there else f"{answers[0]} (in another window)"
        return Shown(
            [Text(renderer.render(ids, labels), "question and context"), Label(text, "answer")],
            {"input_ids": ids, "text": renderer.text(ids), "answers": answers},
        )

    def describe(self, view: View) -> Description:
        rows, empty = set[Any](), set[Any]()
        for store, at in map(view.locate, range(len(view))):
            row = store.folder, store.row_of[at]
            rows.add(row)
            if store.value("answers", at) == "[]":
                empty.add(row)
        words = f"{len(rows):,}, of which {len(empty):,} have no answer in their context; {len(view):,} windows"
        return Description({"questions": len(rows), "unanswerable": len(empty)}, {"questions": words})

    def predict(self, model: nn.Module, rows: Sequence[Row], options: PredictOptions) -> Iterator[dict[str, Any]]:
        reader = self.read(table_of(rows, options.columns), labelled=False)
        windows = [self._windows(row, reader) for row in rows]
        flat = [example for examples in windows for example in examples]
        scores = iter(logits_of(model, flat, self.collate_inputs, options.batch_size))
        for examples in windows:
            found = [self._likeliest(example, next(scores)) for example in examples]
            yield self._answer(examples[0].arrays["context"], found)


def score_of(answer: str, right: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 of words with the closest right answer, as SQuAD's own script computes them.

    An empty ``answer``: nothing was found. No ``right`` ones: the answer is not in the context.
    """
    known = [each for each in right if _words(each)] or [""]
    exact = max(float(_words(answer) == _words(each)) for each in known)
    return exact, max(_f1(_words(answer), _words(each)) for each in known)


def _words(text: str) -> list[str]:
    """The words of an answer: lower case, without punctuation and articles."""
    text = "".join(mark for mark in text.lower() if mark not in string.punctuation)
    return _ARTICLES.sub(" ", text).split()


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))


def _question(window: Example) -> tuple[str, bytes]:
    """What all windows of a question share. Two rows may have one name, as two columns of questions in a file have."""
    ids, places = (np.asarray(window.arrays[name]) for name in ("input_ids", "places"))
    return window.arrays["row"], ids[places[:, 0] == _NO_PLACE].tobytes()


def _read_part(windows: Sequence[Example], start: int, text: str) -> tuple[int, int]:
    """The place of an answer without characters around it that no token stands for, as some tokenizers drop marks."""
    read = np.zeros(len(windows[0].arrays["context"]), bool)
    for first, last in (place for each in windows for place in each.arrays["places"]):
        read[first:last] = True
    there = start + np.flatnonzero(read[start : start + len(text)])
    return (int(there[0]), int(there[-1]) + 1) if len(there) else (start, start + len(text))


def _target(example: Example, answer: tuple[int, int] | None, none: int) -> tuple[int, int]:
    """The first and last token of the place of an answer in a window; ``none`` twice if not all of it is there."""
    if answer is None:
        return none, none
    places, (start, end) = np.asarray(example.arrays["places"]), answer
    inside = np.flatnonzero((places[:, 1] > start) & (places[:, 0] < end) & (places[:, 0] >= 0))
    if not len(inside) or places[inside[0], 0] > start or places[inside[-1], 1] < end:
        return none, none
    return int(inside[0]), int(inside[-1])


def _answers(row: Row, reader: Reader) -> list[tuple[int, str]]:
    """The place and text of each right answer of a row, without blanks around it; none: it is not in the context.

    An answer without a place is looked up: its first one.
    """
    key, context = reader.names["answers"], reader.text(row, "context", blank=False)
    found = []
    for text, given in _given_answers(row, reader):
        start = context.find(text) if given is None else given
        if given is None and start < 0:
            raise row.place.error(f"the answer {shortened(text)} is not in the context", key=key)
        there = context[start : start + len(text)] if start >= 0 else ""
        if there != text:
            message = f"the answer {shortened(text)} is not at character {start} of the context: {shortened(there)} is"
            raise row.place.error(message, key=key)
        if text.strip():
            found.append((start + len(text) - len(text.lstrip()), text.strip()))
    return found


def _given_answers(row: Row, reader: Reader) -> list[tuple[str, int | None]]:
    """The texts of a row's answers, with their places as far as the row has them."""
    value, key = reader.value(row, "answers"), reader.names["answers"]
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        starts = value.get("answer_start", [None] * len(value["text"]))
        if not isinstance(starts, list) or len(starts) != len(value["text"]):
            raise row.place.error(f"expected an answer_start for each text, found {shortened(starts)}", key=key)
        value = [{"text": text, "answer_start": start} for text, start in zip(value["text"], starts, strict=True)]
    found = list[tuple[str, int | None]]()
    for each in [] if value is None else [value] if isinstance(value, dict | str) else value:
        answer = {"text": each.strip()} if isinstance(each, str) else each if isinstance(each, dict) else {}
        text, start = answer.get("text"), answer.get("answer_start")
        if not isinstance(text, str) or not isinstance(start, int | None):
            raise row.place.error(f"expected text and answer_start, found {shortened(each)}", key=key)
        found.append((text, start))
    return found


def _has_several_places(row: Row, reader: Reader) -> bool:
    """Whether the answer that is trained has no place in the row, and more than one in the context."""
    given = [(text, start) for text, start in _given_answers(row, reader) if text.strip()]
    return bool(given) and given[0][1] is None and str(row.values[reader.names["context"]]).count(given[0][0]) > 1


TASK = QuestionAnswering
