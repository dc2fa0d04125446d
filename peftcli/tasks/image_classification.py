"""Image classification: put a picture into a class, or into several.

A row: ``{"image": "photos/1.jpg", "label": "cat"}``, or a file in a folder that is named as its class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from peftcli.data.rows import Reader, Row, Table
from peftcli.data.store import Example, Outcome
from peftcli.models.tokens import save_processor
from peftcli.tasks import PICTURES, settings
from peftcli.tasks.base import Batch
from peftcli.tasks.classification import LABEL, Classification
from peftcli.tasks.files import FILE_COLUMNS, File, errors_of_row, file_of
from peftcli.tasks.pictures import check_image, noise, open_image, pixels, shown_picture
from peftcli.tasks.shown import Label, Shown


class ImageClassification(Classification[settings.ImageClassificationSettings]):
    """The task ``image_classification``."""

    name = "image_classification"
    arguments = ("image",)
    columns: ClassVar = {**FILE_COLUMNS, "label": LABEL}
    unit = "images"
    identity = ("digest",)
    input_packages: ClassVar = {"PIL": "vision"}
    reads_files = True
    versions = ("pillow",)

    def fingerprint(self) -> dict[str, Any]:
        return {}  # the processor is for ``collate``

    def input_columns(self, table: Table) -> Mapping[str, Sequence[str]]:
        return {"image": PICTURES}

    def encode_inputs(self, row: Row, reader: Reader) -> Outcome:
        file, content = file_of(row, reader, "image")
        with errors_of_row(row, reader.names["image"]):
            check_image(content, file.path)
        return Outcome([Example(file.arrays(), 1, 1)], size=1)

    def collate_inputs(self, examples: Sequence[Example]) -> Batch:
        files = [File.of(each) for each in examples]
        return pixels(self, [open_image(each.read(), each.path) for each in files])

    def show(self, example: Example) -> Shown:
        return Shown([shown_picture(example), Label(self.label_text(example))])

    def probe(self) -> Batch:
        return pixels(self, noise())

    def save(self, folder: Path) -> list[str]:
        return [
            self.write_task(folder, settings=self.settings, config={}),
            *save_processor(folder, self.processor),
        ]


TASK = ImageClassification
