"""Picture files of rows, for every task whose rows have some: found, checked, decoded, read again for a batch."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from peftcli.data.rows import Place, Reader, Row
from peftcli.errors import DataError
from peftcli.tasks import shown

if TYPE_CHECKING:
    from PIL.Image import Image

_THUMBNAIL = 96
"""The longer side of a picture that ``inspect`` shows."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


@dataclass(frozen=True)
class File:
    """A file of a row, as a store holds it: three columns ``path`` (str), ``content`` and ``digest`` (bytes)."""

    path: str
    """Empty where the row has only bytes."""
    held: bytes
    """The bytes that the row has; empty where the path is read."""
    digest: bytes

    def read(self) -> bytes:
        """Read the file, which must still be the one that was encoded.

        Raises:
            DataError: it is not.
        """
        content = self.held or _read(self.path)
        if _digest(content) != self.digest:
            raise DataError("has changed since the rows were read", file=self.path, hint="Start a new run.")
        return content


def file_of(row: Row, reader: Reader, column: str) -> tuple[File, bytes]:
    """The file that a row names, or whose bytes it has, and its content.

    Raises:
        DataError: the row has none, or it cannot be read.
    """
    value, key = reader.value(row, column), reader.names[column]
    path, content = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (value, None)
    if isinstance(value, bytes):
        path, content = "", value
    if not content and (not isinstance(path, str) or not path):
        raise row.place.error(f"expected a file or the bytes of a picture, found {value!r:.60}", key=key)
    found = str(path or "") if content else _find(str(path), row.place)
    try:
        read = content or _read(found)
    except DataError as error:
        raise in_row(error, row, key) from None
    return File(found, content or b"", _digest(read)), read


def in_row(error: DataError, row: Row, key: str) -> DataError:
    """The error of a picture's file, as one of its row, with the path."""
    message = f"{error.file}: {error.message}" if error.file else error.message
    return row.place.error(message, key=key, hint=error.hint)


@contextmanager
def opened(content: bytes, path: str = "") -> Iterator[Image]:
    """Open a picture as it is stored. Inside, what Pillow raises is about the picture.

    Raises:
        DataError: it cannot be read; ``path`` names it.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that is odd
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                yield image
    except UnidentifiedImageError:
        raise DataError(f"is not a picture in one of the formats {', '.join(_FORMATS)}", file=path) from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"the picture cannot be read: {error}", file=path) from None


def open_image(content: bytes, path: str = "") -> Image:
    """Decode a picture and turn it upright, as transformers' pipelines do.

    Raises:
        DataError: it cannot be read; ``path`` names it.
    """
    from PIL import Image, ImageOps

    with opened(content, path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits of grey, of which convert keeps the lower 8
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        upright.load()
        return upright


def shown_image(image: Image, path: str, size: tuple[int, int], mode: str) -> shown.Image:
    """A picture as ``inspect`` shows it.

    Args:
        image: What is drawn; it is made smaller.
        path: Of the file.
        size: Width and height of the file's picture.
        mode: Of the file's picture, Pillow's name.
    """
    content = io.BytesIO()
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    image.convert("RGB").save(content, "PNG")
    return shown.Image(path, *size, mode, content.getvalue())


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


def _find(path: str, place: Place) -> str:
    """Return a picture's path, which may be relative to the file that names it."""
    beside = Path(place.source).parent / path
    return str(beside) if beside.is_file() else path
