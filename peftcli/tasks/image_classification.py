"""Image classification: put a picture into a class, or into several.

A row: ``{"image": "photos/1.jpg", "label": "cat"}``, or a file in a folder that is named as its class.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from peftcli.data.rows import Place, Reader, Row, Table
from peftcli.data.store import Column, Example, Outcome
from peftcli.errors import DataError
from peftcli.models.open import OpenBase
from peftcli.tasks import settings, shown
from peftcli.tasks.base import Batch, require_extra
from peftcli.tasks.classification import LABEL, Classification
from peftcli.tasks.shown import Label, Shown

if TYPE_CHECKING:
    from PIL.Image import Image

_THUMBNAIL = 96
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


class ImageClassification(Classification[settings.ImageClassification]):
    """The task ``image_classification``."""

    name = "image_classification"
    arguments = ("image",)
    columns: ClassVar = {"path": Column("str"), "content": Column("bytes"), "digest": Column("bytes"), "label": LABEL}
    unit = "images"
    identity = ("digest",)

    def __init__(self, settings: settings.ImageClassification, processor: Any, base: OpenBase):
        require_extra("PIL", "vision")
        super().__init__(settings, processor, base)

    def fingerprint(self) -> dict[str, Any]:
        return {"versions": {"pillow": version("pillow")}}

    def input_columns(self, table: Table) -> Mapping[str, Sequence[str]]:
        return {"image": ("image", "file_name", "img")}

    def encode_inputs(self, rows: Sequence[Row], reader: Reader) -> list[Outcome | DataError]:
        return [_outcome(row, reader) for row in rows]

    def collate_inputs(self, examples: Sequence[Example]) -> Batch:
        images = [open_image(_content(each), each.arrays["path"]).convert("RGB") for each in examples]
        return {"pixel_values": self.processor(images, return_tensors="pt")["pixel_values"]}

    def show(self, example: Example) -> Shown:
        path, content = example.arrays["path"], io.BytesIO()
        image = open_image(_content(example), path)
        size, mode = image.size, image.mode
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        image.convert("RGB").save(content, "PNG")
        picture = shown.Image(path, *size, mode, content.getvalue())
        return Shown([picture, Label(self.label_text(example))])

    def probe(self) -> Batch:
        """Two pictures of noise."""
        from PIL import Image

        noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
        return {"pixel_values": self.processor(list(map(Image.fromarray, noise)), return_tensors="pt")["pixel_values"]}

    def save(self, folder: Path) -> list[str]:
        return super().save(folder) + [Path(name).name for name in self.processor.save_pretrained(folder)]


def open_image(content: bytes, path: str = "") -> Image:
    """Decode a picture and turn it upright, as transformers' pipelines do.

    Raises:
        DataError: it cannot be read; ``path`` names it.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that is odd
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                upright = ImageOps.exif_transpose(image)
                if upright.mode.startswith("I"):  # 16 bits of grey, of which convert keeps the lower 8
                    upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
                upright.load()
                return upright
    except UnidentifiedImageError:
        raise DataError(f"is not a picture in one of the formats {', '.join(_FORMATS)}", file=path) from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"the picture cannot be read: {error}", file=path) from None


def _content(example: Example) -> bytes:
    """Read the file of a picture, which must still be the one that was encoded.

    Raises:
        DataError: it is not.
    """
    path, content = example.arrays["path"], example.arrays["content"] or _read(example.arrays["path"])
    if _digest(content) != example.arrays["digest"]:
        raise DataError("has changed since the rows were read", file=path, hint="Start a new run.")
    return content


def _read(path: str) -> bytes:
    """Read a file.

    Raises:
        DataError: the row has no picture, or it cannot be read.
    """
    if not Path(path).is_file():
        raise DataError("no such file", file=path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", file=path) from None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:8]


def _outcome(row: Row, reader: Reader) -> Outcome | DataError:
    value, key = reader.value(row, "image"), reader.names["image"]
    path, content = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (value, None)
    if isinstance(value, bytes):
        path, content = "", value
    if not content and (not isinstance(path, str) or not path):
        return row.place.error(f"expected a file or the bytes of a picture, found {value!r:.60}", key=key)
    found = str(path or "") if content else _find(str(path), row.place)
    try:
        held = content or _read(found)
        open_image(held, found)
    except DataError as error:
        return row.place.error(f"{found}: {error.message}" if found else error.message, key=key)
    arrays = {"path": found, "content": content or b"", "digest": _digest(held)}
    return Outcome([Example(arrays, 1, 1)], size=1)


def _find(path: str, place: Place) -> str:
    """Return a picture's path, which may be relative to the file that names it."""
    beside = Path(place.source).parent / path
    return str(beside) if beside.is_file() else path


TASK = ImageClassification
