"""Image classification: put a picture into a class, or into several.

A row: ``{"image": "photos/1.jpg", "label": "cat"}``, or a file in a folder that is named as its class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from peftcli.data.rows import Reader, Row, Table
from peftcli.data.store import Column, Example, Outcome
from peftcli.errors import DataError
from peftcli.models.open import OpenBase
from peftcli.tasks import settings
from peftcli.tasks.base import Batch, require_extra
from peftcli.tasks.classification import LABEL, Classification
from peftcli.tasks.files import File, file_of, in_row
from peftcli.tasks.pictures import check_image, open_image, shown_image
from peftcli.tasks.shown import Label, Shown


class ImageClassification(Classification[settings.ImageClassification]):
    """The task ``image_classification``."""

    name = "image_classification"
    arguments = ("image",)
    columns: ClassVar = {"path": Column("str"), "content": Column("bytes"), "digest": Column("bytes"), "label": LABEL}
    unit = "images"
    identity = ("digest",)
    reads_files = True

    def __init__(self, settings: settings.ImageClassification, processor: Any, base: OpenBase):
        require_extra("PIL", "vision")
        super().__init__(settings, processor, base)

    def fingerprint(self) -> dict[str, Any]:
        return {"versions": {"pillow": version("pillow")}}

    def input_columns(self, table: Table) -> Mapping[str, Sequence[str]]:
        return {"image": ("image", "file_name", "img", "image_file_name")}

    def encode_inputs(self, rows: Sequence[Row], reader: Reader) -> list[Outcome | DataError]:
        return [_outcome(row, reader) for row in rows]

    def collate_inputs(self, examples: Sequence[Example]) -> Batch:
        files = [_file(each) for each in examples]
        images = [open_image(each.read(), each.path).convert("RGB") for each in files]
        return {"pixel_values": self.processor(images, return_tensors="pt")["pixel_values"]}

    def show(self, example: Example) -> Shown:
        file = _file(example)
        image = open_image(file.read(), file.path)
        picture = shown_image(image, file.path, image.size, image.mode)
        return Shown([picture, Label(self.label_text(example))])

    def probe(self) -> Batch:
        """Two pictures of noise."""
        from PIL import Image

        noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
        return {"pixel_values": self.processor(list(map(Image.fromarray, noise)), return_tensors="pt")["pixel_values"]}

    def save(self, folder: Path) -> list[str]:
        return super().save(folder) + [Path(name).name for name in self.processor.save_pretrained(folder)]


def _file(example: Example) -> File:
    return File(*(example.arrays[name] for name in ("path", "content", "digest")))


def _outcome(row: Row, reader: Reader) -> Outcome | DataError:
    try:
        file, content = file_of(row, reader, "image")
    except DataError as error:
        return error
    try:
        check_image(content, file.path)
    except DataError as error:
        return in_row(error, row, reader.names["image"])
    return Outcome([Example({"path": file.path, "content": file.held, "digest": file.digest}, 1, 1)], size=1)


TASK = ImageClassification
