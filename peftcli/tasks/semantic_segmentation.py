"""Semantic segmentation: give each pixel of a picture a class.

A row: ``{"image": "street/1.jpg", "annotation": "street/1.png"}``. The second file is the mask: a picture of the same
size, in which the value of each pixel is the number of its class.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from peftcli.data.findings import Finding
from peftcli.data.rows import Reader, Row, Table, listed, of_all_rows
from peftcli.data.store import Column, Example, Outcome, View
from peftcli.errors import DataError
from peftcli.models.open import OpenBase
from peftcli.models.tokens import save_processor
from peftcli.system.disk import write_file
from peftcli.tasks import PICTURES, settings
from peftcli.tasks.base import (
    Batch,
    Loss,
    PredictOptions,
    Task,
    model_inputs,
    on_device,
    scores_of,
    table_of,
)
from peftcli.tasks.files import FILE_COLUMNS, File, errors_of_row, file_of
from peftcli.tasks.findings import FINDINGS
from peftcli.tasks.labels import UNBALANCED, LabelReader, LabelScan, Tables, describe_counts, index_of, missing_classes
from peftcli.tasks.parts import Parts, RowScore, join, loss_parts, mean_of_some, ratio
from peftcli.tasks.pictures import (
    noise,
    open_image,
    opened_picture,
    orientation_of,
    picture_of,
    pixels,
    png,
    processed,
    shown_image,
    turned,
)
from peftcli.tasks.shown import Description, Label, Shown

if TYPE_CHECKING:
    from PIL.Image import Image

    from peftcli.core.config import AdapterConfig

IGNORED = -1
"""In place of a class: the pixel does not count."""
_USUAL = 255
"""The value of pixels that do not count, unless the recipe names another."""
_MIDDLE = 127
_HALF = 0.5
"""The largest value of class 0 in a binary mask."""
_BINARY = 1
"""The flag of a row whose mask has no values but 0 and 255, which does not count."""
_SHADES = {b"\2\0": 85, b"\4\0": 17}
"""Bits and kind of a grey PNG, as its header has them -> the number by which Pillow multiplies its values."""
_BINARY_HINT = "It looks like a binary mask, in which 255 stands for 1: set task: {binary_masks: true}."
_BYTE = 256


class SemanticSegmentation(Task[settings.SemanticSegmentationSettings]):
    """The task ``semantic_segmentation``."""

    name = "semantic_segmentation"
    arguments = ("image",)
    columns: ClassVar = {
        **FILE_COLUMNS,
        **{f"mask_{name}": column for name, column in FILE_COLUMNS.items()},
        "turn": Column("int64", ()),
        "pixels": Column("int64"),
    }
    unit = "pixels"
    reports = ("loss", "mean_iou", "mean_accuracy", "overall_accuracy", "iou_*")
    main_metric = "mean_iou"
    identity = ("digest",)
    label_columns = ("mask_digest",)
    findings_of_flags: ClassVar = {"binary_masks": _BINARY}
    input_packages: ClassVar = {"PIL": "vision"}
    instead_of_texts = "reads pictures"
    reads_files = True
    versions = ("transformers", "pillow")
    advice: ClassVar = {
        "no pixel counts": "Set task.ignore_index to a value that no class has, or task.reduce_labels to false."
    }

    def __init__(self, settings: settings.SemanticSegmentationSettings, processor: Any, base: OpenBase):
        super().__init__(settings, processor, base)
        self.labels = tuple(settings.labels or ())
        """Names of the classes, in the order of the model's outputs."""
        index_of(self.labels, "class")

    def model_options(self) -> dict[str, Any]:
        return self.settings.model_options() | self._config_options()

    def _config_options(self) -> dict[str, Any]:
        """A second head, for a loss of its own while pretraining, would get no gradients and stay random."""
        return {"use_auxiliary_head": False} if getattr(self.base.config, "use_auxiliary_head", False) else {}

    def fit_model(self, model: nn.Module, config: AdapterConfig | None) -> list[str]:
        notes = super().fit_model(model, config)
        if config and self.settings.ignore_index == _USUAL < len(self.labels) + self.settings.reduce_labels:
            hint = "Name one that no class has, as -1: then every pixel counts."
            raise DataError(f"{_USUAL} is the number of a class", key="task.ignore_index", hint=hint)
        return notes

    def save(self, folder: Path) -> list[str]:
        if hasattr(self.processor, "do_reduce_labels"):
            self.processor.do_reduce_labels = self.settings.reduce_labels
        own = self.write_task(folder, settings=self.settings, config=self._config_options())
        return [own, *save_processor(folder, self.processor)]

    @property
    def needs_scan(self) -> bool:
        return not self.labels

    @property
    def found(self) -> str:
        return f"{len(self.labels)} classes: {listed(self.labels)}"

    def scan(self, tables: Tables) -> settings.SemanticSegmentationSettings:
        """Find how many classes the masks have. Their names are their numbers."""
        scan = LabelScan()
        seen = set[int]().union(*scan.labels(tables, self.read, self._values_of))
        if scan.error and not seen:
            raise of_all_rows(scan.error)
        first = int(self.settings.reduce_labels)
        classes = {value for value in seen if value >= first and value != self.settings.ignore_index}
        held = f"the masks of the training rows hold the values {_listed(seen)}"
        if len(classes) < 2:
            hint = _BINARY_HINT if seen and seen <= {0, 255} else scan.hint
            message = f"{held}, of which {len(classes)} count; the model needs two classes"
            raise DataError(message, key="dataset.train", hint=hint)
        if 2 * len(classes) < max(classes) - first + 1:
            hint = f"Number the classes in the masks from {first}, or name them all in task.labels."
            raise DataError(f"{held}, which hardly are the numbers of classes", key="dataset.train", hint=hint)
        return replace(self.settings, labels=[str(value) for value in range(first, max(classes) + 1)])

    def read(self, table: Table, *, labelled: bool = True) -> LabelReader:
        found = table.reader(
            "masks",
            optional=() if labelled else ("annotation",),
            image=PICTURES,
            annotation=("annotation", "mask", "annotation_file_name", "mask_file_name", "label", "label_file_name"),
        )
        return LabelReader(found.name, found.names)

    def encode_row(self, row: Row, reader: Reader) -> Outcome:
        (file, content), (mask, held) = (file_of(row, reader, column) for column in ("image", "annotation"))
        with errors_of_row(row, reader.names["image"]):
            image = open_image(content, file.path)
        with errors_of_row(row, reader.names["annotation"]):
            values, turn = self._stored_mask(held, mask.path)
            with opened_picture(content, file.path) as stored:
                stored.load()  # which turns a TIFF
                if turn == 1 and values.shape == stored.size[::-1]:  # it was not turned alone
                    turn = orientation_of(stored)
            values = upright(values, turn)
            if values.shape != image.size[::-1]:
                size, other = (f"{width} x {height}" for width, height in (values.shape[::-1], image.size))
                raise DataError(f"the mask has {size} pixels, its picture {other}", file=mask.path)
            classes = self._classes(values, mask.path)
        resized = self._resized([classes])
        pixels = torch.bincount(resized[resized >= 0], minlength=len(self.labels)).tolist()
        binary = self.settings.ignore_index == 255 and set(np.unique(values).tolist()) <= {0, 255} and values.any()
        if not sum(pixels):
            return Outcome([], "no pixel counts", resized.numel(), flags=_BINARY * bool(binary))
        arrays = {**file.arrays(), **mask.arrays("mask_"), "turn": turn, "pixels": pixels}
        example = Example(arrays, resized.numel(), sum(pixels))
        return Outcome([example], size=example.size, flags=_BINARY * bool(binary))

    def _values_of(self, row: Row, reader: Reader) -> set[int]:
        file, content = file_of(row, reader, "annotation")
        return set(np.unique(self._stored_mask(content, file.path)[0]).tolist())

    def _stored_mask(self, content: bytes, path: str) -> tuple[np.ndarray, int]:
        values, turn = stored_mask(content, path)
        return (values > _MIDDLE).astype(np.uint8) if self.settings.binary_masks else values, turn

    def _classes(self, values: np.ndarray, path: str) -> np.ndarray:
        """The class of each pixel, ``IGNORED`` where it does not count."""
        first = int(self.settings.reduce_labels)
        counts = (values >= first) & (values != self.settings.ignore_index)
        classes = np.where(counts, values.astype(np.int64) - first, IGNORED)
        below = (values < 0) & (values != self.settings.ignore_index)
        if (unknown := values[(classes >= len(self.labels)) | below]).size:
            last = len(self.labels) - 1 + first
            raise DataError(
                f"the mask holds the values {_listed(np.unique(unknown).tolist())}; those of the labels are {first} to "
                f"{last}, and {self.settings.ignore_index} does not count",
                file=path,
                hint=_BINARY_HINT if set(np.unique(values).tolist()) <= {0, 255} else None,
            )
        return classes

    def _resized(self, masks: Sequence[np.ndarray]) -> torch.Tensor:
        """The classes (B, H, W) of the pixels that the model reads, from those of the pictures.

        A mask goes through the image processor as a picture, with the nearest pixel where that interpolates. The outer
        channels hold the class, and the middle one what is above a byte, plus one: 0 does not count, nor does padding.
        """
        from PIL import Image

        pictures = []
        for classes in masks:
            high, low = np.divmod(np.maximum(classes, 0), _BYTE)
            middle = np.where(classes == IGNORED, 0, high + 1)
            pictures.append(Image.fromarray(np.stack([low, middle, low], axis=-1).astype(np.uint8)))
        plain = {"do_rescale": False, "do_normalize": False, "resample": Image.Resampling.NEAREST}
        resized = processed(self.processor, pictures, **plain)["pixel_values"].long()  # (B, 3, H, W)
        return torch.where(resized[:, 1] > 0, (resized[:, 1] - 1) * _BYTE + resized[:, 0], IGNORED)

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        pictures = [open_image(file.read(), file.path) for file in map(File.of, examples)]
        return pixels(self, pictures) | {"_labels": self._resized([self._read_mask(each) for each in examples])}

    def _read_mask(self, example: Example) -> np.ndarray:
        mask = File.of(example, "mask_")
        values, _ = self._stored_mask(mask.read(), mask.path)
        return self._classes(upright(values, int(example.arrays["turn"])), mask.path)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Cross-entropy of the pixels that count. The logits, smaller than the picture, are interpolated to its size.

        In evaluation there is the confusion matrix (C, C): rows are the label, columns the prediction.
        """
        labels = batch["_labels"]  # (B, H, W)
        logits = _enlarged(model(**model_inputs(batch)).logits, labels.shape[1:])  # (B, C, H, W)
        total = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        sums = {"loss": total.detach()}
        if not model.training:
            counts, size = labels != IGNORED, len(self.labels)
            pairs = labels[counts] * size + logits.detach().argmax(1)[counts]
            sums["confusion"] = torch.bincount(pairs, minlength=size * size).view(size, size)
        return Loss(total, sums)

    def constant_metrics(self, view: View) -> dict[str, float]:
        pixels = self._pixels(view)
        share = float(pixels.max() / pixels.sum())
        return {"mean_iou": share / np.count_nonzero(pixels), "loss": math.log(len(self.labels))}

    def metrics(self, sums: Mapping[str, np.ndarray], outputs: Sequence[Any], num_targets: int) -> dict[str, float]:
        matrix = sums["confusion"]
        hits, wanted, found = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
        there = np.flatnonzero(wanted + found)  # a class that neither masks nor predictions hold does not count
        iou = dict(zip(there.tolist(), hits[there] / (wanted + found - hits)[there], strict=True))
        return {
            "loss": float(sums["loss"]) / num_targets,
            "mean_iou": float(np.mean(list(iou.values()))),
            "mean_accuracy": float(np.mean(hits[wanted > 0] / wanted[wanted > 0])),
            "overall_accuracy": float(hits.sum() / matrix.sum()),
            **{f"iou_{self.labels[at]}": float(value) for at, value in iou.items()},
        }

    def parts(self, rows: Sequence[RowScore]) -> Parts:
        """Count right, wanted and found pixels of each class. A row is right whose mean IoU is at least a half."""
        matrices = [row.sums["confusion"] for row in rows]
        counts = np.array([[np.diag(each), each.sum(axis=1), each.sum(axis=0)] for each in matrices])  # (N, 3, C)
        iou = mean_of_some(ratio(counts[:, 0], counts[:, 1] + counts[:, 2] - counts[:, 0]))
        found = Parts(counts.reshape(len(rows), -1), self._metrics_of_counts, iou >= _HALF)
        return join(loss_parts(rows), found)

    def _metrics_of_counts(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        hits, wanted, found = np.split(sums, 3, axis=1)
        iou = ratio(hits, wanted + found - hits)
        return {
            "mean_iou": mean_of_some(iou),
            "mean_accuracy": mean_of_some(ratio(hits, wanted)),
            "overall_accuracy": ratio(hits.sum(axis=1), wanted.sum(axis=1)),
            **{f"iou_{name}": iou[:, at] for at, name in enumerate(self.labels)},
        }

    def show(self, example: Example) -> Shown:
        """The picture with its mask over it, and how many of its pixels each class has."""
        file, classes = File.of(example), self._read_mask(example)
        image = open_image(file.read(), file.path)
        picture = shown_image(image, file.path, drawn=_overlay(image, classes))
        pixels = np.asarray(example.arrays["pixels"])
        shares = [f"{self.labels[at]} {pixels[at] / pixels.sum():.0%}" for at in np.flatnonzero(pixels)]
        return Shown([picture, Label(", ".join(shares))])

    def _pixels(self, view: View) -> np.ndarray:
        """Pixels of each class, of all examples together."""
        return np.sum([store.value("pixels", at) for store, at in map(view.locate, range(len(view)))], axis=0)

    def describe(self, view: View) -> Description:
        pixels = self._pixels(view)
        return describe_counts("classes", dict(zip(self.labels, pixels.tolist(), strict=True)), int(pixels.sum()))

    def findings(self, view: View) -> list[Finding]:
        pixels, rows, ignored = self._pixels(view), len(view), self.settings.ignore_index - self.settings.reduce_labels
        missing = [self.labels[at] for at in np.flatnonzero(pixels == 0) if at != ignored]
        found = missing_classes(missing, rows, ", in no mask")
        for at in np.flatnonzero(pixels >= UNBALANCED * pixels.sum()):
            more = f": {self.labels[at]!r}, {pixels[at] / pixels.sum():.1%}"
            found.append(FINDINGS["unbalanced_masks"].finding(rows, rows, (), more=more))
        return found

    def probe(self) -> Batch:
        return pixels(self, noise())

    def predict(self, model: nn.Module, rows: Sequence[Row], options: PredictOptions) -> Iterator[dict[str, Any]]:
        """Answer rows in their order. The mask of each, and the picture with the mask over it, become files.

        A mask is as large as its picture and has the values of the training rows' masks.
        """
        reader = self.read(table_of(rows, options.columns), labelled=False)
        folder = options.beside.with_name(f"{options.beside.name}.masks")
        device = next(model.parameters()).device
        for start in range(0, len(rows), options.batch_size):
            images = list["Image"]()
            for row in rows[start : start + options.batch_size]:
                images.append(picture_of(row, reader)[1])
            with torch.inference_mode():
                scores = scores_of(model(**on_device(pixels(self, images), device))).float().cpu()
            for number, (image, logits) in enumerate(zip(images, scores, strict=True), start=options.first + start):
                classes = self._place_on_picture(logits, image.size[::-1])
                yield self._answer(classes, image, folder / f"{number:05}.png")

    def _place_on_picture(self, logits: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
        """The classes of a picture of this size (H, W), from logits (C, h, w) of what the model has seen of it.

        What the image processor has cut off is ``IGNORED``; what it has padded is no part of the picture.
        """
        places = np.broadcast_to(np.arange(size[0])[:, None], size), np.broadcast_to(np.arange(size[1]), size)
        rows, columns = (self._resized([each])[0].numpy() for each in places)
        is_picture = rows != IGNORED
        ends = [_ends(is_picture.any(axis=1 - axis)) for axis in (0, 1)]
        (top, bottom), (left, right) = ends
        whole = [
            _span(np.unique(each[top:bottom, left:right]), length)
            for each, length in zip((rows, columns), size, strict=True)
        ]
        if whole == [(0, size[0]), (0, size[1])] and is_picture.all():
            return _likeliest(logits, size)
        (up, down), (west, east) = whole
        seen = _enlarged(logits[None], rows.shape)[0][:, top:bottom, left:right]
        classes = np.full(size, IGNORED)
        classes[up:down, west:east] = _likeliest(seen, (down - up, east - west))
        return classes

    def _answer(self, classes: np.ndarray, image: Image, path: Path) -> dict[str, Any]:
        """What ``predict`` says of one row, from the classes (H, W) of its pixels; writes its files."""
        from PIL import Image

        seen = classes[classes != IGNORED]
        values = np.where(classes == IGNORED, self.settings.ignore_index, classes + int(self.settings.reduce_labels))
        most = max(len(self.labels) + int(self.settings.reduce_labels) - 1, self.settings.ignore_index)
        write_file(path, png(Image.fromarray(values.astype(np.uint8 if most < _BYTE else np.uint16))))
        write_file(path.with_suffix(".overlay.png"), png(_overlay(image, classes)))
        pixels = np.bincount(seen, minlength=len(self.labels)) / seen.size
        return {"mask": str(path), "shares": dict(zip(self.labels, pixels.tolist(), strict=True))}


def stored_mask(content: bytes, path: str = "") -> tuple[np.ndarray, int]:
    """The values (H, W) of a mask, of grey the shade and of a palette the index, and its EXIF orientation.

    Raises:
        DataError: it cannot be read, or has colours; ``path`` names it.
    """
    with opened_picture(content, path) as mask:
        values = np.asarray(mask)
        if values.ndim == 3:
            shades = values[..., : values.shape[-1] - (mask.mode in ("LA", "PA", "RGBA"))]  # without transparency
            if (shades != shades[..., :1]).any():
                raise DataError(
                    f"the mask has colours ({mask.mode}); the value of a pixel must be the number of its class",
                    file=path,
                    hint="Save it as a grey PNG, or as one with a palette, whose indices are the numbers.",
                )
            values = shades[..., 0]
        if values.dtype.kind == "f" and (values % 1).any():
            raise DataError("the mask has values with fractions", file=path)
        if mask.format == "PNG":
            values = values // _SHADES.get(content[24:26], 1)
        return values.astype(np.int64), orientation_of(mask)


def upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """The values (H, W) of a mask, turned as EXIF says."""
    from PIL import Image

    return np.asarray(turned(Image.fromarray(values.astype(np.int32)), orientation)).astype(np.int64)


def _ends(mask: np.ndarray) -> tuple[int, int]:
    """The first place where a mask is true, and the place after the last."""
    places = np.flatnonzero(mask)
    return int(places[0]), int(places[-1]) + 1


def _span(places: np.ndarray, length: int) -> tuple[int, int]:
    """Where a part of ``length`` pixels begins and ends, of which evenly spread places are known."""
    half = (places[-1] - places[0]) / (len(places) - 1) / 2 if len(places) > 1 else length
    begin, end = places[0] + 0.5 - half, places[-1] + 0.5 + half
    near = max(1.0, half)  # as far as rounding of the places may be
    return 0 if begin < near else round(begin), length if length - end < near else round(end)


def _enlarged(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Logits (B, C, h, w) at a picture's size (height, width), float32."""
    return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)


def _likeliest(logits: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """The class of each pixel of a picture, from logits (C, h, w): class by class, since photos are large."""
    best, classes = torch.full(size, -torch.inf), torch.zeros(size, dtype=torch.long)
    for at, each in enumerate(logits):
        scores = _enlarged(each[None, None], size)[0, 0]
        classes[scores > best] = at
        best = torch.maximum(best, scores)
    return classes.numpy()


def _overlay(image: Image, classes: np.ndarray) -> Image:
    """A picture with the colour of its class over each pixel that counts."""
    from PIL import Image

    hues = np.arange(classes.max(initial=0) + 1) * 0.618 % 1  # neighbours differ
    colours = np.array([colorsys.hsv_to_rgb(hue, 0.8, 1.0) for hue in hues]) * 255
    pixels = np.asarray(image.convert("RGB"))
    mixed = np.where((classes != IGNORED)[..., None], (pixels + colours[classes]) / 2, pixels)
    return Image.fromarray(mixed.astype(np.uint8))


def _listed(values: Iterable[int]) -> str:
    return listed([str(value) for value in sorted(values)])


TASK = SemanticSegmentation
