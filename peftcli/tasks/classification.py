"""What the classification tasks share: the labels of rows, the loss and the metrics over them, and answers.

A label is the name of a class, a list of names of which several or none hold, or a number to predict.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from peftcli.data.findings import Finding, Records
from peftcli.data.rows import Reader, Row, Table, listed, shortened
from peftcli.data.store import Column, Example, Outcome, View
from peftcli.errors import DataError
from peftcli.models.open import OpenBase
from peftcli.tasks import LABELS, settings
from peftcli.tasks.base import Batch, Loss, PredictOptions, Task, logits_of, table_of
from peftcli.tasks.findings import CLASSES as FINDINGS
from peftcli.tasks.labels import (
    UNBALANCED,
    LabelReader,
    LabelScan,
    Tables,
    balanced_weights,
    describe_counts,
    index_of,
    joined_labels,
    missing_classes,
    number_of,
    refuse_decimal_commas,
    weights_of,
)
from peftcli.tasks.parts import Parts, RowScore, f1, join, loss_parts, mean_of_some, means, pearson_parts, ratio
from peftcli.tasks.shown import Description

Settings = TypeVar("Settings", bound=settings.ClassificationSettings)

LABEL = Column("float32", (None,))
"""The column ``label``: the index of the class; for multi_label 0 or 1 of each class; for regression the number."""
_JOINED = 1 << 8
"""Flag of a row whose label seems to be several ones."""
_HALF = 0.5
_TOP = 5


class Classification(Task[Settings]):
    """A task whose rows have labels. A subclass reads and collates the model's other inputs."""

    arguments: ClassVar[tuple[str, ...]]
    """The columns that texts or files on the command line fill, row after row."""
    lower_is_better = ("loss", "mse")
    packages: ClassVar = {"sklearn": "metrics"}
    label_columns: ClassVar = ("label",)

    def __init__(self, settings: Settings, processor: Any, base: OpenBase):
        super().__init__(settings, processor, base)
        self.labels = tuple(settings.labels or ())
        """Names of the classes, in the order of the model's outputs; none for regression."""
        single, weights = settings.problem_type == "single_label", settings.class_weights
        for key in ("labels", "class_weights"):
            if settings.problem_type == "regression" and getattr(settings, key):
                raise DataError("is a setting of classes; regression predicts a number", key=f"task.{key}")
        self._index = index_of(self.labels, "class", by_number=settings.labels_by_number and single)
        self._weights = torch.tensor(weights_of(self.labels, weights if isinstance(weights, dict) else {}))
        separator, several = settings.label_separator, settings.problem_type in (None, "multi_label")
        if separator is not None and not (separator and several):
            problem = f"a row has one label with problem_type: {settings.problem_type}" if separator else "is empty"
            raise DataError(problem, key="task.label_separator", hint="Leave it out.")
        self._separator, self._joined = joined_labels(self.labels) if single else ("", [])

    @abstractmethod
    def input_columns(self, table: Table) -> Mapping[str, Sequence[str]]:
        """Name the columns of the model's inputs: the task's name -> the names that sources give it."""

    @abstractmethod
    def encode_inputs(self, row: Row, reader: Reader) -> Outcome:
        """Turn a row into an example that lacks its label."""

    @abstractmethod
    def collate_inputs(self, examples: Sequence[Example]) -> Batch:
        """Put the inputs of examples into one batch."""

    def inputs_for(self, model: nn.Module, examples: Sequence[Example]) -> Batch:
        """Put the inputs of examples into one batch for this model, whose number format they may need."""
        return self.collate_inputs(examples)

    @property
    def found(self) -> str:
        if self.settings.problem_type == "regression":
            return "the labels are numbers, which the model learns to predict (regression)"
        several = ", of which a row may have several" if self.settings.problem_type == "multi_label" else ""
        return f"{len(self.labels)} classes{several}: {listed(self.labels)}"

    @property
    def needs_scan(self) -> bool:
        kind = self.settings.problem_type
        is_open = not self.labels or self.settings.class_weights == "balanced"
        return kind is None or (kind != "regression" and is_open)

    def scan(self, tables: Tables) -> Settings:
        """Find what kind of labels the rows have, and the names of the classes.

        Names keep the order of a ``ClassLabel``, else that in which the rows show them. Classes that are called 0 to
        n - 1 keep their numbers.
        """
        scan, seen, floats, repeats = LabelScan(), dict[str, float | None](), False, False
        lengths, counts = set[int](), Counter[str]()  # of lists
        for label in scan.labels(tables, self.read, lambda row, reader: reader.label(row)):
            names = label if isinstance(label, list) else [label]
            counts.update(map(str, names))
            seen |= {str(name): number_of(name) for name in names}
            floats = floats or isinstance(label, float)
            repeats = repeats or len(set(names)) < len(names)
            lengths |= {len(label)} if isinstance(label, list) else set()
        if len(lengths) == 1 and (repeats or lengths == {2}) and seen.keys() <= {"0", "1", "True", "False"}:
            message = "of the training rows have a 0 or 1 for each class; give the names of a row's classes"
            raise DataError(f"the labels {message}", key="dataset.train")
        kind = self.settings.problem_type or ("multi_label" if lengths else None)
        numbers = [number for number in seen.values() if number is not None]
        fractions = len(numbers) == len(seen) and any(number % 1 for number in numbers)
        if kind is None and not self.labels and not scan.declared and (floats or fractions):
            return replace(self.settings, problem_type="regression")
        labels = list(self.labels or scan.declared or seen)
        if kind is None and not (self.labels or scan.declared):
            refuse_decimal_commas(seen)
        if not self.labels and set(labels) == set(map(str, range(len(labels)))):
            labels.sort(key=int)
        if len(self.labels) == 1 and kind != "multi_label":
            raise DataError(f"names one class, {labels[0]!r}; a classifier needs two", key="task.labels")
        if len(labels) < 2 and kind != "multi_label":
            found = f"all training rows have the label {labels[0]!r}" if labels else "no training row has a label"
            cut = "dataset.limit takes the first rows, which may be of one class: raise it, or leave it out"
            hint = scan.hint or (cut if scan.is_limited else None)
            raise DataError(f"{found}; a classifier needs two classes", key="dataset.train", hint=hint)
        kind = kind or "single_label"
        by_number = self.settings.labels_by_number and kind == "single_label" and bool(self.labels or scan.all_declare)
        weights: Any = self.settings.class_weights
        if weights == "balanced":
            weights = balanced_weights(labels, counts, index_of(labels, "class", by_number=by_number))
        return replace(
            self.settings, labels=labels, problem_type=kind, labels_by_number=by_number, class_weights=weights
        )

    def read(self, table: Table, *, labelled: bool = True) -> LabelReader:
        columns = {**self.input_columns(table), "label": LABELS}
        found = table.reader("classification", optional=("label",), lists=("labels",), **columns)
        separator, are_numbers = self.settings.label_separator, self.settings.problem_type == "regression"
        make = partial(LabelReader, found.name, labels=self.labels, separator=separator, are_numbers=are_numbers)
        if one_hot := tuple(name for key, name in table.source.renamed() if key == "labels"):
            names = {key: name for key, name in found.names.items() if key != "label"}
            return make(names, classes=one_hot, one_hot=one_hot)
        if labelled and "label" not in found.names:
            message = f"no column 'label' or 'labels'; the rows have: {listed(table.columns)}"
            truths = [name for name in table.columns if name in table.truths and name not in found.names.values()]
            quoted = [name if name.isidentifier() else json.dumps(name) for name in truths]
            value = f"labels: [{', '.join(quoted)}]" if len(quoted) > 1 else f"label: {(quoted or ['...'])[0]}"
            hint = f"Name the column in the recipe: dataset: {{columns: {{{value}}}}}."
            raise DataError(message, file=table.described, key="dataset.columns", hint=hint)
        classes = table.class_names().get(found.names["label"], ()) if labelled else ()
        return make(found.names, classes=tuple(classes))

    def record_findings(self, records: Records) -> list[Finding]:
        shown = " and ".join(map(repr, self._joined[:2]))
        line = f"task: {{type: {self.name}, label_separator: {json.dumps(self._separator)}}}"
        more = f", as {shown}; to train several labels: {line}"
        joined = records.findings(FINDINGS["joined_labels"], records.with_flag(_JOINED), more=more, of_used=True)
        return joined + super().record_findings(records)

    def encode_row(self, row: Row, reader: Any) -> Outcome:
        target = self._target(row, reader)
        outcome = self.encode_inputs(row, reader)
        outcome.examples[0].arrays["label"] = target
        if self._joined and self.labels[int(target[0])] in self._joined:
            outcome.flags |= _JOINED
        return outcome

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        held = np.stack([np.asarray(each.arrays["label"], np.float32) for each in examples])  # (B, 1) or (B, C)
        labels = torch.from_numpy(held if self.settings.problem_type == "multi_label" else held[:, 0])
        return self.collate_inputs(examples) | {
            "labels": labels.long() if self.settings.problem_type == "single_label" else labels
        }

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits.float()  # (B, C)
        labels, weights = batch["labels"], self._weights.to(logits.device)
        if self.settings.problem_type == "regression":
            total = F.mse_loss(logits[:, 0], labels, reduction="sum")
        elif self.settings.problem_type == "multi_label":
            parts = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
            total = (parts * weights).mean(dim=1).sum()
        else:
            total = (F.cross_entropy(logits, labels, reduction="none") * weights[labels]).sum()
        outputs = () if model.training else self._outputs(logits.detach(), labels)
        return Loss(total, {"loss": total.detach()}, outputs)

    def _outputs(self, logits: torch.Tensor, labels: torch.Tensor) -> list[tuple[Any, list[float]]]:
        """Return the label and the prediction of each row.

        A prediction is the number, the logit of each class (multi_label), or the likeliest classes. Where there are two
        classes, the log-odds of the second follow them: probabilities near 1 would be equal.
        """
        found = logits
        if self.settings.problem_type == "single_label":
            found = logits.topk(min(_TOP, logits.shape[1])).indices.float()
            if len(self.labels) == 2:
                found = torch.cat([found, logits[:, 1:] - logits[:, :1]], dim=1)
        return list(zip(labels.tolist(), found.tolist(), strict=True))

    @property
    def reports(self) -> Sequence[str]:
        if self.settings.problem_type == "regression":
            return ("loss", "mse", "pearson", "spearman")
        known = ("loss", "accuracy", "macro_f1", "micro_f1")
        if self.settings.problem_type == "multi_label":
            return (*known, "auc")
        auc = ("auc",) if len(self.labels) == 2 else ()
        top = ("top5_accuracy",) if len(self.labels) > _TOP else ()
        return (*known, "matthews", *auc, *top)

    @property
    def main_metric(self) -> str:
        return "mse" if self.settings.problem_type == "regression" else "accuracy"

    def constant_metrics(self, view: View) -> dict[str, float]:
        """The metrics of the mean, or the share of the most frequent label."""
        labels = np.stack([store.value("label", at) for store, at in map(view.locate, range(len(view)))])
        if self.settings.problem_type == "regression":
            return dict.fromkeys(("mse", "loss"), float(labels.var()))
        weights, classes = self._weights.numpy(), max(2, len(self.labels))
        counts = np.unique(labels, axis=0, return_counts=True)[1]
        if self.settings.problem_type == "multi_label":
            loss = math.log(2) * float(weights.mean())
        else:
            loss = math.log(classes) * float(weights[labels.astype(int)].mean())
        return {"accuracy": float(counts.max() / len(labels)), "loss": loss}

    def metrics(self, sums: Mapping[str, np.ndarray], outputs: Sequence[Any], num_targets: int) -> dict[str, float]:
        from sklearn import metrics

        loss = {"loss": float(sums["loss"]) / num_targets}
        wanted, found = (np.array(each) for each in zip(*outputs, strict=True))
        if not (math.isfinite(loss["loss"]) and np.isfinite(found).all()):
            return dict.fromkeys(self.reports, math.nan) | loss
        if self.settings.problem_type == "regression":
            numbers = found[:, 0]
            return loss | {"mse": metrics.mean_squared_error(wanted, numbers), **correlations(wanted, numbers)}
        more = dict[str, float]()
        if self.settings.problem_type == "multi_label":
            chosen = found > 0
            both = wanted.min(axis=0) != wanted.max(axis=0)
            if both.any():
                more["auc"] = metrics.roc_auc_score(wanted[:, both], found[:, both])
        else:
            chosen = found[:, 0]
            more["matthews"] = metrics.matthews_corrcoef(wanted, chosen)
            if len(self.labels) == 2 and len(set(wanted)) == 2:
                more["auc"] = metrics.roc_auc_score(wanted, found[:, -1])
            if len(self.labels) > _TOP:
                more["top5_accuracy"] = float((found == wanted[:, None]).any(axis=1).mean())
        alone = len(self.labels) == 1  # whose absence is no class
        macro, micro = ("binary", "binary") if alone else ("macro", "micro")
        return loss | {
            "accuracy": metrics.accuracy_score(wanted, chosen),
            "macro_f1": metrics.f1_score(wanted, chosen, average=macro, zero_division=0),
            "micro_f1": metrics.f1_score(wanted, chosen, average=micro, zero_division=0),
            **more,
        }

    @property
    def judges_rows(self) -> bool:
        return self.settings.problem_type != "regression"

    def parts(self, rows: Sequence[RowScore]) -> Parts:
        wanted, found = (np.array(each) for each in zip(*(row.outputs[0] for row in rows), strict=True))
        loss, ones = loss_parts(rows), np.ones(len(rows))
        if self.settings.problem_type == "regression":
            numbers = found[:, 0]
            return join(loss, means(ones, mse=(wanted - numbers) ** 2), pearson_parts(wanted, numbers))
        if self.settings.problem_type == "multi_label":
            wanted, found = wanted > 0, found > 0
            right = (wanted == found).all(axis=1)
            return join(loss, means(ones, right, accuracy=right), self._class_parts(wanted, found))
        classes, top = np.arange(max(2, len(self.labels))), found[:, :_TOP]
        right = found[:, 0] == wanted
        more = {"top5_accuracy": (top == wanted[:, None]).any(axis=1)} if len(self.labels) > _TOP else {}
        counts = self._class_parts(wanted[:, None] == classes, found[:, :1] == classes)
        return join(loss, means(ones, right, accuracy=right, **more), counts)

    def _class_parts(self, wanted: np.ndarray, found: np.ndarray) -> Parts:
        """The parts of what the right, wanted and found rows of each class give: (N, C) each, true and false."""
        several = self.settings.problem_type == "multi_label"

        def metrics_of(sums: np.ndarray) -> dict[str, np.ndarray]:
            right, wants, finds = np.split(sums, 3, axis=1)
            each, totals = f1(right, wants, finds), (right.sum(axis=1), wants.sum(axis=1), finds.sum(axis=1))
            macro = mean_of_some(np.nan_to_num(each) if several else each)  # as scikit-learn does
            metrics = {"macro_f1": macro, "micro_f1": np.nan_to_num(f1(*totals))}
            if several:
                return metrics
            rows = totals[1]
            spread = (rows**2 - (wants**2).sum(axis=1)) * (rows**2 - (finds**2).sum(axis=1))
            above = totals[0] * rows - (wants * finds).sum(axis=1)
            return metrics | {"matthews": ratio(above, np.sqrt(spread), empty=0.0)}

        return Parts(np.concatenate([wanted & found, wanted, found], axis=1).astype(np.float64), metrics_of)

    def _classes(self, view: View) -> np.ndarray:
        """Which classes each example is of: (N, C), true and false."""
        rows = np.stack([store.value("label", at) for store, at in map(view.locate, range(len(view)))])
        return rows > 0 if self.settings.problem_type == "multi_label" else rows == np.arange(len(self.labels))

    def describe(self, view: View) -> Description:
        if not self.labels:
            return Description()
        counts = dict(zip(self.labels, self._classes(view).sum(axis=0).tolist(), strict=True))
        return describe_counts("classes", counts, len(view), digits=0)

    def label_text(self, example: Example) -> str:
        """The label of an example, in words."""
        label = np.asarray(example.arrays["label"]).tolist()
        if self.settings.problem_type == "regression":
            return f"{label[0]:g}"
        if self.settings.problem_type == "multi_label":
            return ", ".join(name for name, is_in in zip(self.labels, label, strict=True) if is_in)
        return self.labels[int(label[0])]

    def findings(self, view: View) -> list[Finding]:
        if not self.labels:
            return []
        rows, found = self._classes(view), list[Finding]()
        counts = rows.sum(axis=0)
        for at in np.flatnonzero(counts >= UNBALANCED * len(rows)):
            places = map(view.locate, np.flatnonzero(rows[:, at]).tolist())
            named = (store.place(int(store.row_of[each])) for store, each in places)
            more = f": {self.labels[at]!r}"
            found.append(FINDINGS["unbalanced_classes"].finding(int(counts[at]), len(rows), named, more=more))
        missing = [name for name, count in zip(self.labels, counts, strict=True) if not count]
        return found + missing_classes(missing, len(rows), ", which have no row")

    def predict(self, model: nn.Module, rows: Sequence[Row], options: PredictOptions) -> Iterator[dict[str, Any]]:
        reader = self.read(table_of(rows, options.columns), labelled=False)
        examples = [self.encode_inputs(row, reader).examples[0] for row in rows]
        for logits in logits_of(model, examples, partial(self.inputs_for, model), options.batch_size):
            yield self._answer(logits)

    def _answer(self, logits: torch.Tensor) -> dict[str, Any]:
        if self.settings.problem_type == "regression":
            return {"value": float(logits[0])}
        if self.settings.problem_type == "multi_label":
            scores = dict(zip(self.labels, logits.sigmoid().tolist(), strict=True))
            return {"labels": [name for name, score in scores.items() if score > _HALF], "scores": scores}
        scores = dict(zip(self.labels, logits.softmax(dim=0).tolist(), strict=True))
        best = self.labels[int(logits.argmax())]
        return {"label": best, "score": scores[best], "scores": scores}

    def _target(self, row: Row, reader: LabelReader) -> list[float]:
        label, kind, key = reader.label(row), self.settings.problem_type, reader.key
        if kind == "regression":
            number = None if isinstance(label, list) else number_of(label)
            if number is None:
                raise row.place.error(f"expected a number, found {shortened(label)}", key=key)
            return [number]
        if isinstance(label, list) != (kind == "multi_label"):
            expected = "a list of classes" if kind == "multi_label" else "one class"
            raise row.place.error(f"expected {expected}, found {shortened(label)}", key=key)
        names = label if isinstance(label, list) else [str(label)]
        if unknown := [name for name in names if name not in self._index]:
            raise row.place.error(
                f"the label {shortened(unknown[0])} is not one of the classes: {listed(self.labels)}",
                key=key,
                hint="The classes are those of the training rows, unless task.labels names them.",
            )
        places = [self._index[name] for name in names]
        if kind == "multi_label" and len(set(places)) < len(places):
            raise row.place.error(f"names a class twice: {shortened(label)}", key=key)
        if kind == "multi_label":
            return [float(at in places) for at in range(len(self.labels))]
        return [float(places[0])]


def correlations(wanted: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation; 0 where one of the two is constant."""
    from scipy import stats  # comes with scikit-learn

    if np.ptp(wanted) == 0 or np.ptp(found) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    pearson, spearman = stats.pearsonr(wanted, found), stats.spearmanr(wanted, found)
    return {"pearson": float(pearson.statistic), "spearman": float(spearman.statistic)}
