"""Feature extraction: embed texts, so that the cosine of two says how much they belong together.

In-batch negatives: https://arxiv.org/abs/1705.00652; batches larger than memory: https://arxiv.org/abs/2101.06983

A row: ``{"anchor": "Close a file.", "positive": "def close(file): ...", "negative": "def open(path): ..."}``
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftcli.data.findings import Finding, Records
from peftcli.data.rows import Reader, Row, Table
from peftcli.data.store import Column, Example, Outcome, View
from peftcli.data.used_rows import Ragged, UsedRows, repeats
from peftcli.errors import DataError, ModelError
from peftcli.models.open import OpenBase
from peftcli.tasks import settings
from peftcli.tasks.base import (
    Batch,
    Loss,
    PredictOptions,
    Task,
    in_batches,
    number_in,
    on_device,
    refuse_unread,
    scores_of,
    table_of,
)
from peftcli.tasks.classification import correlations
from peftcli.tasks.contrastive import Texts, contrastive_loss, gather_no_texts, ranks_and_losses
from peftcli.tasks.findings import EMBEDDINGS as FINDINGS
from peftcli.tasks.parts import Parts, RowScore, join, means, pearson_parts
from peftcli.tasks.shown import Description, Label, Shared, Shown, Text
from peftcli.tasks.text.answer_inputs import split
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.inputs import TextInputs
from peftcli.tasks.text.sentence_transformers import Pooling, longest, lowers, prompts, read_pooling, write_modules
from peftcli.tasks.text.token_ids import pad_texts, pad_token_id
from peftcli.tasks.text.token_text import TokenRenderer

_PAIR = {"anchor": ("anchor", "query"), "positive": ("positive",), "negative": ("negative",)}
_SCORED = {"sentence1": ("sentence1",), "sentence2": ("sentence2",), "score": ("score",)}
_LABELS = {"label", "score"}
"""Columns that may say of a pair that its texts do not belong together."""
_TRUNCATED = 1
_TOP = (1, 5, 10)


class FeatureExtraction(TextInputs, Task[settings.FeatureExtractionSettings]):
    """The task ``feature_extraction``."""

    name = "feature_extraction"
    arguments: ClassVar = ("text",)
    columns: ClassVar = {"input_ids": Column(), "sizes": Column(), "score": Column("float32", (None,))}
    """The tokens of all texts, one after another; how many each text has; the score of a scored pair."""
    label_columns: ClassVar = ("score",)
    shares = ("anchor", "sentence1")
    flags: ClassVar = {"truncated": _TRUNCATED}
    gathers = True

    def __init__(self, settings: settings.FeatureExtractionSettings, processor: Any, base: OpenBase):
        super().__init__(settings, processor, base)
        between = settings.score_range
        if between is not None and (len(between) != 2 or not between[0] < between[1]):
            raise DataError("must be two numbers, the lower one first, as [0, 5]", key="task.score_range")
        if getattr(base.config, "is_encoder_decoder", False):
            raise ModelError(
                f"{base.name} is an encoder-decoder; embeddings are those of an encoder or a decoder", key="base_model"
            )
        for name, loss in (("temperature", "contrastive"), ("triplet_margin", "triplet")):
            if settings.loss not in (None, loss):
                refuse_unread(settings, [name], f"is a setting of {loss}")
        if settings.pooling is None or settings.normalize is None:
            in_folder = read_pooling(self.base)
            usual = "last" if _reads_one_way(self.base.config) else "mean"
            pooling: Any = settings.pooling or (in_folder.mode if in_folder else usual)
            normalize = (in_folder is None or in_folder.normalize) if settings.normalize is None else settings.normalize
            self.settings = replace(settings, pooling=pooling, normalize=normalize)

    @property
    def packages(self) -> Mapping[str, str]:
        return {"sklearn": "metrics"} if self.settings.loss == "cosine" else {}

    @property
    def max_length(self) -> int:
        return min(super().max_length, longest(self.base) or self.settings.max_length)

    @cached_property
    def _lowers(self) -> bool:
        return lowers(self.base)

    @property
    def notes(self) -> Sequence[str]:
        if not (names := prompts(self.base)):
            return ()
        listed = ", ".join(map(repr, names))
        return (f"rows are embedded without the base model's prompts ({listed}): put their texts into the rows",)

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"max_length": self.max_length, "lowers": self._lowers}

    def export(self, folder: Path) -> None:
        assert self.settings.pooling is not None
        pooling = Pooling(self.settings.pooling, bool(self.settings.normalize))
        size = self.base.config.get_text_config().hidden_size
        write_modules(folder, pooling, size=size, max_length=self.max_length, base=self.base)

    def ask_exported(self, folder: Path, texts: Sequence[str]) -> tuple[list[dict[str, Any]], Any]:
        from sentence_transformers import SentenceTransformer

        return [{"text": text} for text in texts], SentenceTransformer(str(folder), device="cpu").encode(list(texts))

    # --- rows ---------------------------------------------------------------------------------------------------------

    @property
    def needs_scan(self) -> bool:
        return self.settings.loss is None

    @property
    def found(self) -> str:
        return f"{'scored pairs' if self.settings.loss == 'cosine' else 'pairs'}: the loss is {self.settings.loss}"

    def scan(self, tables: Iterable[tuple[Table, Iterator[Row]]]) -> settings.FeatureExtractionSettings:
        kinds = dict[str, str]()
        for table, _ in tables:
            there = {*table.columns, *table.source.columns}
            scored = "sentence1" in there and not {"anchor", "query"} & there
            kinds["cosine" if scored else "contrastive"] = table.described
        if len(kinds) > 1:
            message = f"{kinds['cosine']} has scored pairs, and {kinds['contrastive']} has others: no loss fits both"
            raise DataError(message, key="dataset.mix")
        loss: Any = next(iter(kinds))
        return replace(self.settings, loss=loss)

    def read(self, table: Table) -> Reader:
        if self.settings.loss == "cosine":
            return table.reader("scored pairs", **_SCORED)
        triplets, numbered = self.settings.loss == "triplet", _numbered(table)
        optional = () if triplets and not numbered else ("negative",)
        return table.reader("triplets" if triplets else "pairs", optional=optional, **_PAIR, **numbered)

    def encode_row(self, row: Row, reader: Reader) -> Outcome:
        texts = [text for column in reader.names if column != "score" for text in _texts(row, reader, column)]
        if self.settings.loss == "triplet" and len(texts) < len(_PAIR):
            raise row.place.error("expected a text, found none", key=[*reader.names.values()][-1])
        score = [_score(row, reader, self.settings.score_range)] if "score" in reader.names else []
        example, size = self._example(texts, row, score)
        return Outcome([example], size=size, flags=_TRUNCATED * (size > example.size))

    def _example(self, texts: Sequence[str], row: Row, score: Sequence[float] = ()) -> tuple[Example, int]:
        """The example of some texts, and the tokens that they have uncut."""
        texts = [text.lower() for text in texts] if self._lowers else texts
        found = [self.processor(text, verbose=False)["input_ids"] for text in texts]
        size = sum(map(len, found))
        for at, (ids, text) in enumerate(zip(found, texts, strict=True)):
            if len(ids) > self.max_length:
                found[at] = self.processor(text, truncation=True, max_length=self.max_length)["input_ids"]
            if not ids:
                raise row.place.error(f"holds nothing that the tokenizer knows: {text!r:.60}")
        arrays = {"input_ids": np.concatenate(found), "sizes": list(map(len, found)), "score": list(score)}
        return Example(arrays, sum(map(len, found)), 1), size

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        """The texts of all rows, (R, T): anchors, then positives, then negatives, padded on the right."""
        texts = [split(each, "input_ids") for each in examples]
        negatives = [(row, text) for row, each in enumerate(texts) for text in each[2:]]
        ordered = [each[side] for side in (0, 1) for each in texts] + [text for _, text in negatives]
        keys = [_key(text) for text in ordered]
        asked = [*keys[: len(texts)], *keys[: len(texts)], *keys[2 * len(texts) :]]
        return pad_texts(ordered, pad_token_id(self.processor)) | {
            "_lengths": list(map(len, ordered)),
            "_keys": torch.tensor([keys, asked]).T,
            "_rows": len(texts),
            "_owners": torch.tensor([row for row, _ in negatives], dtype=torch.long),
            "_scores": torch.tensor(np.array([each.arrays["score"] for each in examples], np.float32)),
        }

    # --- the model ----------------------------------------------------------------------------------------------------

    def embed(self, model: nn.Module, batch: Batch, size: int, *, again: bool = False) -> torch.Tensor:
        """The embeddings of a batch's texts, float32, of any length: (R, D).

        ``size`` texts are in the model at once; those of like length share a part. ``again``: compute each part once
        more for its gradient, with the same dropout, instead of keeping it.
        """
        lengths = batch["_lengths"]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        parts = []
        for start in range(0, len(order), size):
            some = order[start : start + size]
            width = lengths[some[-1]]
            inputs = [batch[name][some, :width] for name in ("input_ids", "attention_mask")]
            parts.append(
                checkpoint(self._pooled, model, *inputs, use_reentrant=False) if again else self._pooled(model, *inputs)
            )
        back = torch.tensor(order, device=parts[0].device).argsort()
        return torch.cat(parts)[back]

    def _pooled(self, model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The embeddings (B, D) of texts (B, T); virtual tokens, which stand before them, do not count."""
        hidden = scores_of(model(input_ids=ids, attention_mask=mask)).float()[:, -ids.shape[1] :]
        kept, lengths = mask.bool()[..., None], mask.sum(1)
        if self.settings.pooling == "mean":
            return (hidden * kept).sum(1) / lengths[:, None]
        if self.settings.pooling == "max":
            return hidden.masked_fill(~kept, -math.inf).amax(1)
        last = self.settings.pooling == "last"
        return hidden[torch.arange(len(ids), device=ids.device), lengths - 1 if last else 0]

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        size = self.settings.mini_batch_size if model.training else None
        found = self.embed(model, batch, size or batch["_rows"], again=bool(size))
        with torch.autocast(found.device.type, enabled=False):  # cosines differ in the third digit
            texts = Texts(F.normalize(found, dim=1), batch["_keys"], batch["_rows"])
            if not model.training:
                return Loss(found.new_zeros(()), outputs=_outputs(texts, batch))
            if self.settings.loss == "cosine":
                return Loss(((_paired(texts) - batch["_scores"][:, 0]) ** 2).sum())
            if self.settings.loss == "triplet":
                return Loss(self._triplet(texts, batch["_owners"]))
            return Loss(contrastive_loss(texts, self.settings.temperature))

    def refuse_rows(self, examples: View, count: int, *, training: bool) -> None:
        alone = training and self.settings.loss == "contrastive" and min(count, len(examples)) == 1
        if alone and all(len(examples[at].arrays["sizes"]) < len(_PAIR) for at in range(len(examples))):
            raise DataError(
                "a batch of one pair has no negatives: nothing would be learnt",
                key="training.per_device_train_batch_size",
            )

    def gather_nothing(self, device: torch.device) -> None:
        if self.settings.loss == "contrastive":
            gather_no_texts(device)

    def _triplet(self, texts: Texts, owners: torch.Tensor) -> torch.Tensor:
        anchors, negatives = texts.embeddings[: texts.anchors], texts.embeddings[2 * texts.anchors :]
        gap = _paired(texts)[owners] - (anchors[owners] * negatives).sum(1)
        each = owners.bincount(minlength=texts.anchors)[owners]
        return (F.relu(self.settings.triplet_margin - gap) / each).sum()

    # --- metrics ------------------------------------------------------------------------------------------------------

    @property
    def reports(self) -> Sequence[str]:
        if self.settings.loss == "cosine":
            return ("loss", "pearson", "spearman")
        return ("loss", *(f"recall_at_{most}" for most in _TOP), "mrr")

    @property
    def main_metric(self) -> str:
        return "spearman" if self.settings.loss == "cosine" else "recall_at_1"

    def constant_metrics(self, view: View) -> dict[str, float]:
        return {"spearman": 0.0, "recall_at_1": 1 / len(view)}

    def metrics(self, sums: Mapping[str, np.ndarray], outputs: Sequence[Any], num_targets: int) -> dict[str, float]:
        """Recall and mean reciprocal rank among all texts of the evaluation rows, or how cosines follow the scores."""
        if self.settings.loss == "cosine":
            cosines, scores = _cosines(outputs)
            return {"loss": float(((cosines - scores) ** 2).mean()), **correlations(scores, cosines)}
        return {name: float(each.mean()) for name, each in self._of_rows(outputs).items()}

    def _of_rows(self, outputs: Sequence[Any]) -> dict[str, np.ndarray]:
        """Each metric of each row, whose mean over rows evaluation reports."""
        ranks, losses = ranks_and_losses(outputs, self.settings.temperature)
        if self.settings.loss == "triplet":
            margin = self.settings.triplet_margin
            losses = np.array(
                [np.maximum(margin - each[0] @ each[1] + each[2:] @ each[0], 0).mean() for each, *_ in outputs]
            )
        return {"loss": losses, **{f"recall_at_{most}": ranks <= most for most in _TOP}, "mrr": 1 / ranks}

    @property
    def judges_rows(self) -> bool:
        return self.settings.loss != "cosine"

    def parts(self, rows: Sequence[RowScore]) -> Parts:
        """Of pairs the rank among the texts of all rows, which stay the same whichever rows are drawn."""
        outputs, ones = [row.outputs[0] for row in rows], np.ones(len(rows))
        if self.settings.loss == "cosine":
            cosines, scores = _cosines(outputs)
            return join(means(ones, loss=(cosines - scores) ** 2), pearson_parts(scores, cosines))
        found = self._of_rows(outputs)
        return means(ones, found["recall_at_1"].astype(bool), **found)

    # --- what commands ask --------------------------------------------------------------------------------------------

    def show(self, example: Example) -> Shown:
        renderer, texts = TokenRenderer(self.processor), [each.tolist() for each in split(example, "input_ids")]
        scores = np.asarray(example.arrays["score"]).tolist()
        names = list(_SCORED)[:2] if scores else [*list(_PAIR)[:2], *["negative"] * (len(texts) - 2)]
        shown = [Text(renderer.render(ids, [IGNORED] * len(ids)), name) for name, ids in zip(names, texts, strict=True)]
        return Shown([*shown, *(Label(f"{score:g}", "score") for score in scores)], {"input_ids": texts})

    def record_findings(self, records: Records) -> list[Finding]:
        labelled = records.findings(FINDINGS["pairs_with_label"], records.with_unread(_LABELS), of_used=True)
        return labelled + super().record_findings(records)

    def findings(self, view: View) -> list[Finding]:
        if self.settings.loss == "cosine":
            return []  # texts may be of several scored pairs, and equal ones have a score too
        found = _Hashes(view)
        masks = {
            "positive_is_anchor": found.anchors == found.positives,
            "negative_is_positive": found.bad_negatives,
            "repeated_texts": repeats(found.anchors) | repeats(found.positives),
        }
        return UsedRows(view).findings((FINDINGS[name], mask) for name, mask in masks.items())

    def describe(self, view: View) -> Description:
        found = _Hashes(view)
        counts = {name: len(np.unique(getattr(found, name))) for name in ("anchors", "positives")}
        lines = {f"distinct {name}": f"{count:,}" for name, count in counts.items()}
        if found.negatives:
            counts["negatives"] = found.negatives
            lines["negatives"] = f"{found.negatives:,}"
        return Description(counts, lines, [Shared("anchors", FINDINGS["anchors_in_eval"], found.anchors)])

    def predict(self, model: nn.Module, rows: Sequence[Row], options: PredictOptions) -> Iterator[dict[str, Any]]:
        """The embedding of each row's ``text``, or the similarity of the texts of each row of pairs."""
        reader = _reader_of_rows(rows, options.columns)
        texts = [[each for column in reader.names for each in _texts(row, reader, column)] for row in rows]
        flat = [self._example([text], row)[0] for row, each in zip(rows, texts, strict=True) for text in each]
        device = next(model.parameters()).device

        def embed(some: Sequence[Example]) -> torch.Tensor:
            inputs = pad_texts([each.arrays["input_ids"] for each in some], pad_token_id(self.processor))
            with torch.inference_mode():
                return self._pooled(model, *on_device(inputs, device).values()).cpu()

        every = iter(in_batches(flat, options.batch_size, embed))
        for each in texts:
            yield self._answer([next(every) for _ in each])

    def _answer(self, vectors: Sequence[torch.Tensor]) -> dict[str, Any]:
        first, *others = [F.normalize(each, dim=0) for each in vectors]
        if not others:
            return {"embedding": (first if self.settings.normalize else vectors[0]).tolist()}
        cosines = [float(first @ each) for each in others]
        more = {"negative_similarities": cosines[1:]} if cosines[1:] else {}
        return {"similarity": cosines[0], **more}


@dataclass
class _Hashes:
    """A hash for each text of all rows."""

    view: View

    def __post_init__(self) -> None:
        rows = UsedRows(self.view)
        self.anchors, self.positives = (np.zeros(len(rows), np.uint64) for _ in range(2))
        self.bad_negatives, self.negatives = np.zeros(len(rows), bool), 0
        for some, (ids, sizes) in rows.chunks("input_ids", "sizes"):
            hashes = Ragged(ids.values, np.cumsum(sizes.values) - sizes.values).hashes()
            anchors, positives = hashes[sizes.starts], hashes[sizes.starts + 1]
            owners = sizes.owners()
            same = (hashes == anchors[owners]) | (hashes == positives[owners])
            same[sizes.starts] = same[sizes.starts + 1] = False
            self.anchors[some], self.positives[some] = anchors, positives
            self.bad_negatives[some] = np.bincount(owners, same, minlength=len(anchors)) > 0
            self.negatives += len(hashes) - 2 * len(anchors)


def _cosines(outputs: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The cosine of each scored pair, and its score: (N,) each."""
    cosines = np.array([one @ other for (one, other), *_ in outputs])
    return cosines, np.array([score for *_, (score,) in outputs])


def _paired(texts: Texts) -> torch.Tensor:
    """The cosine of each anchor and its positive: (B,)."""
    one, other = texts.embeddings[: 2 * texts.anchors].chunk(2)
    return (one * other).sum(1)


def _outputs(texts: Texts, batch: Batch) -> list[tuple[np.ndarray, list[int], list[float]]]:
    """Of each row: the embeddings of its texts, their keys, its score."""
    vectors, keys = texts.embeddings.detach().cpu().numpy(), texts.keys[:, 0].tolist()
    owners, found = batch["_owners"].tolist(), list[tuple[np.ndarray, list[int], list[float]]]()
    for row, score in enumerate(batch["_scores"].tolist()):
        mine = [row, row + texts.anchors, *(2 * texts.anchors + at for at, owner in enumerate(owners) if owner == row)]
        found.append((vectors[mine], [keys[at] for at in mine], score))
    return found


def _key(ids: np.ndarray) -> int:
    """A number that tells a text from others, the same in every process."""
    return int.from_bytes(hashlib.blake2b(np.asarray(ids, np.int64).tobytes(), digest_size=8).digest()) >> 1


def _reader_of_rows(rows: Sequence[Row], renamed: Mapping[str, str]) -> Reader:
    """Find the texts of rows that are to be answered: pairs, scored or not, else single texts."""
    columns = table_of(rows, {}).columns
    for known in (_PAIR, _SCORED):
        wanted = {name: usual for name, usual in known.items() if name != "score"}
        names = {name: column for name, column in renamed.items() if name in wanted}
        if all(name in names or set(usual) & set(columns) for name, usual in list(wanted.items())[:2]):
            table = table_of(rows, names)
            return table.reader(
                "pairs", optional=("negative",), **wanted, **(_numbered(table) if known is _PAIR else {})
            )
    usual = ("text", "sentence", *(name for known in (_PAIR, _SCORED) for name in known if name != "score"))
    return table_of(rows, {}).reader("texts", text=(*usual, "query", *renamed.values()))


def _numbered(table: Table) -> dict[str, Sequence[str]]:
    """The columns that sentence-transformers gives the negatives of a row where it has several."""
    return {name: (name,) for name in table.columns if re.fullmatch(r"negative_\d+", name)}


def _texts(row: Row, reader: Reader, column: str) -> list[str]:
    """The texts of a column: one, or of negatives as many as there are."""
    if column.startswith("negative") and row.values.get(reader.names[column]) in (None, "", []):
        return []
    value = reader.value(row, column)
    values = value if column.startswith("negative") and isinstance(value, list) else [value]
    for each in values:
        if not isinstance(each, str) or not each.strip():
            raise row.place.error(f"expected a text, found {each!r:.60}", key=reader.names[column])
    return values


def _score(row: Row, reader: Reader, between: Sequence[float] | None) -> float:
    """The score of a row, of a range of its own from 0 to 1."""
    value, (low, high) = number_in(reader.value(row, "score")), between or (-1, 1)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        as_cosines = "" if between else ", as cosines are"
        message = f"expected a number from {low:g} to {high:g}{as_cosines}, found {value!r:.60}"
        hint = "Where scores have another range, name it: task: {score_range: [0, 5]}."
        raise row.place.error(message, key=reader.names["score"], hint=hint)
    return (value - low) / (high - low) if between else float(value)


def _reads_one_way(config: Any) -> bool:
    """Whether a token sees those before it alone: the model's kind has a class that continues texts, and no masks."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING


TASK = FeatureExtraction
