"""Object detection: find the things on a picture, each with its class and its box.

A row: ``{"image": "street/1.jpg", "objects": {"bbox": [[10, 20, 30, 40]], "category": ["car"]}}``. A box is left, top,
width and height, in pixels of the picture as it is shown. A picture without objects is trained as background.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoModelForObjectDetection

from peftcli.core.layer import cast
from peftcli.data.findings import Finding, Records
from peftcli.data.rows import BAD, Reader, Row, Table, listed, of_all_rows
from peftcli.data.store import Column, Example, Outcome, View
from peftcli.errors import DataError, ModelError
from peftcli.models.open import OpenBase
from peftcli.models.probe import probing
from peftcli.models.tokens import save_processor
from peftcli.system.disk import write_file
from peftcli.tasks import PICTURES, settings
from peftcli.tasks.average_precision import Matches, average_precision, match_boxes
from peftcli.tasks.base import Batch, Loss, PredictOptions, Task, model_inputs, on_device, table_of
from peftcli.tasks.boxes import Cut, Objects, checked_boxes, draw_boxes, lie_in, objects_of
from peftcli.tasks.files import FILE_COLUMNS, File, errors_of_row, file_of
from peftcli.tasks.findings import BOXES
from peftcli.tasks.labels import LabelReader, LabelScan, Tables, describe_counts, index_of, missing_classes
from peftcli.tasks.parts import Parts, RowScore, ratio
from peftcli.tasks.pictures import check_image, noise, open_image, picture_of, png, shown_image, size_of
from peftcli.tasks.shown import Description, Label, Shown

if TYPE_CHECKING:
    from PIL.Image import Image

    from peftcli.core.config import AdapterConfig

_CORNERS, _BOXES = 1, 2
"""The flag of a row whose boxes lie in the picture in the other form too, and of one with boxes."""
_NEARLY_ALL = 0.95
_ALIKE = 1e-3
"""By how much, relatively, the loss of two pictures may differ from the sum of theirs."""


class ObjectDetection(Task[settings.ObjectDetectionSettings]):
    """The task ``object_detection``."""

    name = "object_detection"
    arguments = ("image",)
    columns: ClassVar = {
        **FILE_COLUMNS,
        "picture": Column("int32", (2,)),  # width and height as it is shown
        "boxes": Column("float64", (None, 4)),
        "classes": Column(),
        "crowd": Column("bool"),
    }
    unit = "images"
    reports = ("loss", "map", "map_50", "map_75")
    main_metric = "map"
    identity = ("digest",)
    label_columns = ("boxes", "classes")
    input_packages: ClassVar = {"PIL": "vision"}
    packages: ClassVar = {"scipy": "vision"}
    instead_of_texts = "reads pictures"
    reads_files = True
    versions = ("pillow",)

    def __init__(self, settings: settings.ObjectDetectionSettings, processor: Any, base: OpenBase):
        super().__init__(settings, processor, base)
        self.labels = tuple(settings.labels or ())
        """Names of the classes, in the order of the model's outputs."""
        self._index = index_of(self.labels, "class")
        if not hasattr(processor, "post_process_object_detection"):
            message = f"its image processor, {type(processor).__name__}, gives no boxes"
            raise ModelError(message, file=base.name, key="base_model")
        self._pads = not self._is_fixed and _reads_masks(base.config)
        if _has_backbone_of_timm(base.config) and importlib.util.find_spec("timm") is None:
            message = "its backbone is one of the package timm: pip install timm"
            raise ModelError(message, file=base.name, key="base_model")

    def fingerprint(self) -> dict[str, Any]:
        return {}  # the processor is for ``collate``

    def model_options(self) -> dict[str, Any]:
        return self.settings.model_options() | self._config_options()

    def _config_options(self) -> dict[str, Any]:
        """No denoising: its queries are drawn, and their number depends on the other rows of a batch."""
        return {"num_denoising": 0} if getattr(self.base.config, "num_denoising", 0) else {}

    def fit_model(self, model: nn.Module, config: AdapterConfig | None) -> list[str]:
        notes = super().fit_model(model, config)
        found: Any = model
        if not isinstance(found.loss_function, _LossOfProcess):
            found.loss_function = _LossOfProcess(found.loss_function)
        if config and not self._is_fixed:
            height, width = self._canvas
            how = "scaled into, and padded to," if self._pads else "stretched to"
            notes.append(f"pictures are {how} {width} x {height} pixels")
        return notes

    def check_model(self, model: nn.Module) -> None:
        if not self.labels:
            return
        examples = [
            Example({"boxes": [[8.0 * at, 8, 16, 16 + at] for at in range(count)], "classes": [0] * count}, 1, 1)
            for count in (1, 3)
        ]
        device, pictures = next(model.parameters()).device, [(each, Cut(0, 0, *each.size)) for each in noise()]
        for each in examples:
            each.arrays["crowd"] = [False] * len(each.arrays["classes"])
        batches = [
            on_device(self._batch(examples[part], pictures[part]), device) for part in (slice(2), slice(1), slice(1, 2))
        ]
        with probing(model, device):
            both, *alone = (_sums(self._run(model, batch)[0]) for batch in batches)
        if any(abs(both[name] - sum(each[name] for each in alone)) > _ALIKE * (1 + abs(both[name])) for name in both):
            message = "the loss of two pictures is not that of their boxes, so that it depends on how a batch is split"
            raise ModelError(message, file=self.base.name, key="base_model")

    def save(self, folder: Path) -> list[str]:
        for name, value in self._preparing().items():
            setattr(self.processor, name, value)
        own = self.write_task(folder, settings=self.settings, config=self._config_options())
        return [own, *save_processor(folder, self.processor)]

    # --- rows ---------------------------------------------------------------------------------------------------------

    @property
    def needs_scan(self) -> bool:
        return not self.labels

    @property
    def found(self) -> str:
        return f"{len(self.labels)} classes: {listed(self.labels)}"

    def scan(self, tables: Tables) -> settings.ObjectDetectionSettings:
        """Find the names of the classes, in the order of the sources' own lists, else as the rows show them."""
        scan, seen = LabelScan(), dict[str, None]()
        for names in scan.labels(tables, self.read, _categories):
            seen |= dict.fromkeys(names)
        labels = list(dict.fromkeys([*scan.declared, *seen]))
        if not labels:
            if scan.error:
                raise of_all_rows(scan.error)
            raise DataError("no training row has an object", key="dataset.train", hint=scan.hint)
        if all(each.isdecimal() for each in labels):
            labels = list(map(str, range(max(map(int, labels)) + 1))) if max(map(int, labels)) < 1000 else labels
        return replace(self.settings, labels=labels)

    def record_findings(self, records: Records) -> list[Finding]:
        """Find corners that are given as widths: some boxes leave their picture, and the others may be corners too."""
        found, masks = super().record_findings(records), records.with_flag(_CORNERS)
        boxed, bad = (records.count(each) for each in (records.with_flag(_BOXES), records.with_outcome(BAD)))
        likely = records.count(masks) >= max(1, _NEARLY_ALL * boxed) and bad > (1 - _NEARLY_ALL) * boxed
        return [*found, *(records.findings(BOXES["boxes_are_corners"], masks, of_used=True) if likely else [])]

    def read(self, table: Table, *, labelled: bool = True) -> LabelReader:
        optional = () if labelled else ("objects",)
        found = table.reader("objects", optional=optional, image=PICTURES, objects=("objects",))
        declared = table.class_names()
        column = found.names.get("objects", "")
        classes = next(
            (names for name, names in declared.items() if name == column or name.startswith(f"{column}.")), ()
        )
        return LabelReader(found.name, found.names, classes=classes, labels=self.labels)

    def encode_row(self, row: Row, reader: Reader) -> Outcome:
        assert isinstance(reader, LabelReader)
        file, content = file_of(row, reader, "image")
        with errors_of_row(row, reader.names["image"]):
            check_image(content, file.path)
            size = size_of(content, file.path)
        objects, names = _objects(row, reader), _categories(row, reader)
        for name in names:
            if name not in self._index:
                message = f"{name!r} is not one of the classes: {listed(self.labels)}"
                raise row.place.error(message, key=reader.names["objects"])
        form = self.settings.box_format
        other = "xyxy" if form == "xywh" else "xywh"
        try:
            boxes = checked_boxes(objects.boxes, size, form)
        except ValueError as error:
            fits = lie_in(objects.boxes, size, other)
            hint = f"As {other}, all boxes of the row lie in the picture: see task.box_format." if fits else None
            raise row.place.error(str(error), key=reader.names["objects"], hint=hint) from None
        arrays = {
            **file.arrays(),
            "picture": size,
            "boxes": boxes,
            "classes": [self._index[name] for name in names],
            "crowd": np.array(objects.crowd, bool),
        }
        may_be_other = form == "xywh" and lie_in(objects.boxes, size, other)
        return Outcome([Example(arrays, 1, 1)], size=1, flags=_CORNERS * may_be_other + _BOXES * bool(len(boxes)))

    # --- batches ------------------------------------------------------------------------------------------------------

    def _cut(self, example: Example, *, training: bool) -> Cut:
        """The part of its picture that an example shows at this step."""
        size = tuple(np.asarray(example.arrays["picture"]).tolist())
        if not (training and self.settings.augment):
            return Cut(0, 0, *size)
        return Cut.drawn(self.settings.augment, example.draw, size, _targets(example)[0])

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        pictures = [
            (open_image((file := File.of(each)).read(), file.path), self._cut(each, training=training))
            for each in examples
        ]
        batch = self._batch(examples, pictures)
        return batch if training else batch | {"_examples": list(examples)}

    def _batch(self, examples: Sequence[Example], pictures: Sequence[tuple[Image, Cut]]) -> Batch:
        """Return what the model reads of pictures, and the boxes on them: middles and sides, as shares of theirs."""
        batch, boxes, classes = self._pixels([cut.of(image) for image, cut in pictures]), list[Any](), list[Any]()
        for example, (_, cut) in zip(examples, pictures, strict=True):
            given, kinds = _targets(example)
            moved, kept = cut.moved(given)
            begins, sides = (part / cut.size for part in np.split(moved[kept], 2, axis=1))
            boxes.append(np.concatenate([begins + sides / 2, sides], axis=1))
            classes.append(kinds[kept])
        return batch | {
            "_boxes": torch.from_numpy(np.concatenate(boxes)).float(),
            "_classes": torch.from_numpy(np.concatenate(classes)).long(),
            "_counts": torch.tensor([len(each) for each in classes]),
        }

    def step_inputs(self, examples: Iterable[Example]) -> Batch:
        """How many objects each picture of the step has, by which the loss is normalised."""
        counts = []
        for each in examples:
            counts.append(int(self._cut(each, training=True).moved(_targets(each)[0])[1].sum()))
        return {"_counts_of_step": torch.tensor(counts)}

    @property
    def _is_fixed(self) -> bool:
        return bool((self.processor.size or {}).get("height"))

    @property
    def _canvas(self) -> tuple[int, int]:
        """Height and width of what the model reads of every picture, so that no picture depends on the others'."""
        size = dict(self.processor.size or {})
        if self._is_fixed and not self.settings.resolution:
            return int(size["height"]), int(size["width"])
        side = self.settings.resolution or size.get("shortest_edge") or size.get("max_height")
        if not side:
            message = f"its image processor names no size: {size}"
            raise ModelError(message, file=self.base.name, key="base_model", hint="Set task.resolution.")
        return int(side), int(side)

    def _preparing(self) -> dict[str, Any]:
        """Options of the image processor. Boxes are shares of the picture, also where that is padded."""
        height, width = self._canvas
        if not self._pads:
            return {"size": {"height": height, "width": width}, "do_resize": True, "do_pad": False}
        edges = {"max_height": height, "max_width": width}
        return {"size": edges, "do_resize": True, "do_pad": True, "pad_size": {"height": height, "width": width}}

    def _pixels(self, pictures: Sequence[Image]) -> Batch:
        """Return pictures as the model reads them, with a mask of what is no padding if there is some."""
        found = [self.processor(each.convert("RGB"), return_tensors="pt", **self._preparing()) for each in pictures]
        if any(each["pixel_values"].shape[-2:] != self._canvas for each in found):
            message = f"its image processor does not give pictures of {' x '.join(map(str, self._canvas[::-1]))} pixels"
            raise ModelError(message, file=self.base.name, key="base_model")
        names = ("pixel_values", "pixel_mask") if self._pads else ("pixel_values",)
        return {name: torch.cat([each[name] for each in found]) for name in names}

    # --- loss and metrics ---------------------------------------------------------------------------------------------

    def _run(self, model: nn.Module, batch: Batch) -> tuple[_Normalised, Any]:
        """Run the model with its own loss."""
        counts = batch["_counts"].tolist()
        labels = [
            {"boxes": boxes, "class_labels": classes}
            for boxes, classes in zip(batch["_boxes"].split(counts), batch["_classes"].split(counts), strict=True)
        ]
        outputs = model(**model_inputs(batch), labels=labels)
        empty = getattr(self.base.config, "eos_coefficient", None)
        has_none = outputs.logits.shape[-1] > len(self.labels)  # a class for no object, of a weight of its own
        classes = [value for name, value in outputs.loss_dict.items() if has_none and name.startswith("loss_ce")]
        of_classes = sum((value.float() for value in classes), torch.zeros((), device=outputs.logits.device))
        weights = _Weights(outputs.logits.shape[1], 0.0 if empty is None else float(empty))
        return _Normalised(of_classes, outputs.loss.float() - of_classes, weights, batch["_counts"]), outputs

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The model's own loss: of classes by the weights of its queries, of boxes by the number of objects.

        Both are those of all pictures of the step, so that the split into micro-batches changes nothing.
        """
        found, outputs = self._run(model, batch)
        step = batch["_counts_of_step"] if "_counts_of_step" in batch else batch["_counts"]
        total = found.total(step) * len(step)
        rows = [] if model.training or "_examples" not in batch else self._outputs(outputs, batch)
        return Loss(total, {name: value.detach() for name, value in found.sums().items()}, rows)

    def _outputs(self, outputs: Any, batch: Batch) -> list[tuple[bool, dict[int, Matches]]]:
        """Of each picture: whether all is right at the threshold, and the matches of each class."""
        examples = batch["_examples"]
        sizes = [np.asarray(each.arrays["picture"]).tolist() for each in examples]
        found = self._found(outputs, sizes)
        return [self._matches(each, *detections) for each, detections in zip(examples, found, strict=True)]

    def _matches(
        self, example: Example, boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray
    ) -> tuple[bool, dict[int, Matches]]:
        wanted, kinds, crowd = (np.asarray(example.arrays[name]) for name in ("boxes", "classes", "crowd"))
        matches = dict[int, Matches]()
        right = True
        for kind in sorted({*kinds.tolist(), *classes.tolist()}):
            mine, theirs = classes == kind, kinds == kind
            matches[kind] = each = match_boxes(boxes[mine], scores[mine], wanted[theirs], crowd[theirs].astype(bool))
            sure = each.scores > self.settings.threshold
            hits, ignored = each.right[0][sure], each.ignored[0][sure]
            right = right and int(hits.sum()) == each.objects and bool((hits | ignored).all())
        return right, matches

    def _found(self, outputs: Any, sizes: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Boxes (N, 4), classes and scores of the detections on each picture, the surest first.

        ``sizes`` are width and height of the pictures, in whose pixels the boxes are.
        """
        given = SimpleNamespace(
            logits=outputs.logits.detach().float().cpu(), pred_boxes=outputs.pred_boxes.detach().float().cpu()
        )
        targets = torch.tensor([(height, width) for width, height in sizes])
        answers = self.processor.post_process_object_detection(given, threshold=0.0, target_sizes=targets)
        found = []
        for each in answers:
            order = np.argsort(-(scores := each["scores"].double().numpy()), kind="stable")
            corners = each["boxes"].double().numpy()[order]
            boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
            found.append((boxes, each["labels"].numpy()[order], scores[order]))
        return found

    def metrics(self, sums: Mapping[str, np.ndarray], outputs: Sequence[Any], num_targets: int) -> dict[str, float]:
        loss = _loss_of(np.array([[float(sums[name]) for name in _SUMS]]))[0]
        return {"loss": float(loss), **average_precision([matches for _, matches in outputs])}

    def parts(self, rows: Sequence[RowScore]) -> Parts:
        """Count what the loss is made of; no sum gives a mAP. A row is right whose objects, and no more, are found."""
        values = np.array([[float(row.sums[name]) for name in _SUMS] for row in rows])
        right = np.array([all(each for each, _ in row.outputs) for row in rows])
        return Parts(values, lambda sums: {"loss": _loss_of(sums)}, right)

    # --- for people ---------------------------------------------------------------------------------------------------

    def show(self, example: Example) -> Shown:
        """The picture with its boxes, and how many objects of each class it has."""
        file = File.of(example)
        image = open_image(file.read(), file.path)
        boxes, classes = (np.asarray(example.arrays[name]) for name in ("boxes", "classes"))
        picture = shown_image(image, file.path, drawn=draw_boxes(image, boxes, classes.tolist()))
        counts = Counter(self.labels[at] for at in classes.tolist())
        text = ", ".join(f"{count} {name}" for name, count in counts.items()) or "no object"
        return Shown([picture, Label(text, "objects")], {"boxes": np.asarray(boxes).round(2).tolist()})

    def _counts(self, view: View) -> np.ndarray:
        """Objects of each class, of all examples together."""
        found = np.zeros(len(self.labels), np.int64)
        for store, at in map(view.locate, range(len(view))):
            found += np.bincount(np.asarray(store.value("classes", at)), minlength=len(self.labels))
        return found

    def describe(self, view: View) -> Description:
        counts = self._counts(view)
        return describe_counts(
            "objects", dict(zip(self.labels, counts.tolist(), strict=True)), max(1, int(counts.sum()))
        )

    def findings(self, view: View) -> list[Finding]:
        missing = [self.labels[at] for at in np.flatnonzero(self._counts(view) == 0)]
        return missing_classes(missing, len(view), ", on no picture")

    def probe(self) -> Batch:
        return self._pixels(noise())

    def predict(self, model: nn.Module, rows: Sequence[Row], options: PredictOptions) -> Iterator[dict[str, Any]]:
        """Answer rows in their order. With a file of answers, the pictures with their boxes stand beside it."""
        reader = self.read(table_of(rows, options.columns), labelled=False)
        device = next(model.parameters()).device
        for start in range(0, len(rows), options.batch_size):
            images = [picture_of(row, reader)[1] for row in rows[start : start + options.batch_size]]
            batch = on_device(self._pixels(images), device)
            with torch.inference_mode():
                outputs = model(**model_inputs(batch))
            for at, (boxes, classes, scores) in enumerate(self._found(outputs, [each.size for each in images])):
                sure = int((scores > self.settings.threshold).sum())
                boxes, kinds, scores = boxes[:sure], classes[:sure].tolist(), scores[:sure].tolist()
                names = [self.labels[kind] for kind in kinds]
                if options.beside != PredictOptions.beside:
                    folder = options.beside.with_name(f"{options.beside.name}.boxes")
                    texts = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
                    path = folder / f"{options.first + start + at:05}.png"
                    write_file(path, png(draw_boxes(images[at], boxes, kinds, texts)))
                yield {
                    "objects": [
                        {"label": name, "score": score, "box": box}
                        for name, score, box in zip(names, scores, boxes.tolist(), strict=True)
                    ]
                }


_SUMS = ("classes", "weights", "boxes", "objects")
"""What the loss is made of: of classes with the weights of its queries, of boxes with the number of objects."""


def _loss_of(sums: np.ndarray) -> np.ndarray:
    """The loss (D,) of such sums (D, 4)."""
    classes, weights, boxes, objects = sums.T
    return ratio(classes, weights, 0.0) + boxes / objects.clip(min=1)


@dataclass(frozen=True)
class _Weights:
    """By what the loss of classes is normalised: 1 for each query with an object, less for one without."""

    queries: int
    empty: float

    def of(self, counts: torch.Tensor) -> torch.Tensor:
        matched = counts.clamp(max=self.queries).sum()
        return matched + self.empty * (len(counts) * self.queries - matched)


@dataclass(frozen=True)
class _Normalised:
    """The two parts of a batch's loss, each with what it was divided by."""

    classes: torch.Tensor
    boxes: torch.Tensor
    weights: _Weights
    counts: torch.Tensor

    def sums(self) -> dict[str, torch.Tensor]:
        weight, objects = self.weights.of(self.counts), self.counts.sum()
        values = (self.classes * weight, weight, self.boxes * objects.clamp(min=1), objects)
        return {name: value.float() for name, value in zip(_SUMS, values, strict=True)}

    def total(self, counts: torch.Tensor) -> torch.Tensor:
        """Return what the batch adds to the loss of a step, whose pictures have these numbers of objects."""
        own = self.sums()
        of_classes = own["classes"] / self.weights.of(counts).clamp(min=torch.finfo(torch.float32).tiny)
        return of_classes + own["boxes"] / counts.sum().clamp(min=1)


class _LossOfProcess:
    """A model's own loss function in float32, normalised by what this process computes alone."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        device = args[0].device.type
        with torch.autocast(device, enabled=False), _alone():
            return self._function(
                *cast(args, torch.float32), **{name: cast(value, torch.float32) for name, value in kwargs.items()}
            )


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, loss functions of transformers see one process, and exchange nothing with others."""
    state, PartialState._shared_state = PartialState._shared_state, {}
    try:
        yield
    finally:
        PartialState._shared_state = state


def _sums(found: _Normalised) -> dict[str, float]:
    return {name: float(value) for name, value in found.sums().items()}


def _targets(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, 4) and classes of the objects that are trained."""
    boxes, classes, crowd = (np.asarray(example.arrays[name]) for name in ("boxes", "classes", "crowd"))
    return boxes.reshape(-1, 4)[~crowd.astype(bool)], classes[~crowd.astype(bool)].astype(np.int64)


def _objects(row: Row, reader: Reader) -> Objects:
    try:
        return objects_of(reader.value(row, "objects"))
    except ValueError as error:
        raise row.place.error(str(error), key=reader.names["objects"]) from None


def _categories(row: Row, reader: LabelReader) -> list[str]:
    """The names of the classes of a row's objects."""
    try:
        return [reader.class_name(each) for each in _objects(row, reader).categories]
    except ValueError as error:
        raise row.place.error(str(error), key=reader.names["objects"]) from None


def _reads_masks(config: Any) -> bool:
    """Whether a config's model takes a mask of what is no padding."""
    model: Any = AutoModelForObjectDetection._model_mapping.get(type(config), None)
    return model is not None and "pixel_mask" in inspect.signature(model.forward).parameters


def _has_backbone_of_timm(config: Any) -> bool:
    backbone = getattr(config, "backbone_config", None)
    return bool(getattr(config, "use_timm_backbone", False)) or getattr(backbone, "model_type", "") == "timm_backbone"


TASK = ObjectDetection
