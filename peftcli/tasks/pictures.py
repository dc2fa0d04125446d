"""Pictures of rows, for every task whose rows have some: decoded, turned upright, shown."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peftcli.data.rows import Reader, Row
from peftcli.data.store import Example
from peftcli.errors import DataError, ModelError
from peftcli.tasks import shown
from peftcli.tasks.base import Batch, Task
from peftcli.tasks.files import File, errors_of_row, file_of

if TYPE_CHECKING:
    from PIL.Image import Image

_PIXELS = "pixel_values"
_PATCHES = (_PIXELS, "pixel_attention_mask", "spatial_shapes")
_THUMBNAIL = 96
"""The longer side of a picture that ``inspect`` shows."""
_NUMBERS = ("I", "F")
"""Beginnings of Pillow's modes of pictures that are whole or other numbers: grey of more than 8 bits."""
_ORIENTATION = 0x0112
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""EXIF orientation -> Pillow's name of what turns such a picture upright."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


@contextmanager
def opened_picture(content: bytes, path: str = "") -> Iterator[Image]:
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
    from PIL import Image

    with opened_picture(content, path) as image:
        image.load()  # which turns a TIFF
        upright = turned(image, orientation_of(image))
        if upright.mode.startswith(_NUMBERS):
            upright = Image.fromarray(_grey(np.asarray(upright), of_16_bits=";" in upright.mode))
        upright.load()
        return upright


def orientation_of(image: Image) -> int:
    """The EXIF orientation of a picture; 1, upright, where it has none that is known."""
    found: Any = image.getexif().get(_ORIENTATION)
    return int(found) if found in _TURNS else 1


def turned(image: Image, orientation: int) -> Image:
    """Turn a picture of this EXIF orientation upright. The rest of its EXIF, which may be damaged, is not read."""
    from PIL import Image

    return image.transpose(Image.Transpose[_TURNS[orientation]]) if orientation in _TURNS else image


def _grey(values: np.ndarray, *, of_16_bits: bool) -> np.ndarray:
    """Grey of numbers as 8 bits, where Pillow's ``convert`` keeps the lower ones of 16, and makes 0 to 1 black."""
    most = values.max()
    if not (values.min() >= 0 and most < 2**16):
        raise ValueError(f"its grey is from {values.min()} to {most}, not within 0 to 1, 255 or 65535")
    if of_16_bits or most > 255:
        return (values // 256).astype(np.uint8)
    return np.rint(values * 255 if values.dtype.kind == "f" and most <= 1 else values).astype(np.uint8)


def check_image(content: bytes, path: str = "") -> None:
    """Decode a picture to its end, a JPEG at an eighth of its size, so that one that is cut off or damaged is found.

    Raises:
        DataError: it cannot be read; ``path`` names it.
    """
    with opened_picture(content, path) as image:
        orientation_of(image)
        image.draft(None, (1, 1))
        image.load()
        if image.mode in _NUMBERS:
            _grey(np.asarray(image), of_16_bits=False)


def size_of(content: bytes, path: str = "") -> tuple[int, int]:
    """Return width and height of a picture as it is shown, after the turn that its EXIF asks for.

    Raises:
        DataError: it cannot be read; ``path`` names it.
    """
    with opened_picture(content, path) as image:
        if image.format == "TIFF":
            image.load()  # which turns it
        return image.size if orientation_of(image) < 5 else image.size[::-1]


def picture_of(row: Row, reader: Reader, column: str = "image") -> tuple[File, Image]:
    """The file that a row names, and its picture.

    Raises:
        DataError: it cannot be read.
    """
    file, content = file_of(row, reader, column)
    with errors_of_row(row, reader.names[column]):
        return file, open_image(content, file.path)


def shown_picture(example: Example, prefix: str = "") -> shown.Image:
    """The picture that an example holds in columns with this prefix, as ``inspect`` shows it."""
    file = File.of(example, prefix)
    return shown_image(open_image(file.read(), file.path), file.path)


def shown_image(image: Image, path: str, drawn: Image | None = None) -> shown.Image:
    """A file's picture as ``inspect`` shows it; ``drawn`` is shown in its place."""
    small = (drawn or image).copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return shown.Image(path, *image.size, image.mode, png(small.convert("RGB")))


def png(image: Image, description: str = "") -> bytes:
    """A picture as a PNG file holds it, with a text that says what it is."""
    from PIL.PngImagePlugin import PngInfo

    content, info = io.BytesIO(), PngInfo()
    if description:
        info.add_itxt("Description", description)
    image.save(content, "PNG", pnginfo=info)
    return content.getvalue()


def noise() -> list[Image]:
    """Two pictures of noise, always the same."""
    from PIL import Image

    return list(map(Image.fromarray, np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)))


def pixels(task: Task[Any], pictures: Sequence[Image]) -> Batch:
    """What a model reads of pictures, in colours or, where it reads one channel, in grey.

    Raises:
        ModelError: the model takes something else than pictures of one size, or their patches.
        DataError: they have no common size.
    """
    mode = "L" if getattr(task.base.config, "num_channels", None) == 1 else "RGB"
    return processed(task.processor, [each.convert(mode) for each in pictures])


def processed(processor: Any, pictures: Sequence[Image], **options: Any) -> Batch:
    """Pictures as an image processor prepares them for its model: ``pixel_values`` (B, C, H, W).

    SigLIP 2's gives the patches of pictures of any shape (B, N, D), their mask (B, N), their rows and columns (B, 2).

    Raises:
        ModelError: the model takes something else.
        DataError: they have no common size.
    """
    found = [processor(each, return_tensors="pt", **options) for each in pictures]
    names = _PATCHES if "spatial_shapes" in found[0] else (_PIXELS,)
    if _PIXELS not in found[0] or found[0][_PIXELS].ndim != (3 if names is _PATCHES else 4):
        message = f"its image processor gives {', '.join(found[0])}, and only {_PIXELS} (3, H, W) are supported"
        raise ModelError(message, key="base_model")
    if len({each[_PIXELS].shape for each in found}) > 1:
        message = "the base model's image processor gives pictures of several sizes, which fit no batch"
        raise DataError(message, key="base_model", hint="Set the batch sizes to 1, or a size in its configuration.")
    return {name: torch.cat([each[name] for each in found]) for name in names}
