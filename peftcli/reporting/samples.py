"""The sample pictures of a run: what evaluations wrote into its folder, side by side over the steps."""

from __future__ import annotations

import io
import math
import re
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from peftcli.guard.files import read_small
from peftcli.reporting.blocks import Block, Picture, Pictures

_NAME = re.compile(r"step-(?P<step>\d+)-(?P<number>\d+)\.png")
_SIDE = 192
"""The longer side of a picture on the page, in pixels."""
_MAX_BYTES = 32 << 20
"""Bytes of a file that is shown."""
_MAX_PIXELS, _MAX_TITLE = 1 << 26, 300
_MAX_STEPS, _MAX_ROWS = 6, 12
"""Pictures of one prompt, and prompts."""


def sample_pictures(folder: Path) -> list[Block]:
    """Return the pictures of ``samples/`` in a run's folder: of each prompt the first, the last and some between."""
    found = defaultdict[int, dict[int, Path]](dict)
    for path in folder.glob("samples/*.png"):
        if name := _NAME.fullmatch(path.name):
            found[int(name["number"])][int(name["step"])] = path
    rows = [_row(number, found[number]) for number in sorted(found)[:_MAX_ROWS]]
    return [row for row in rows if row.pictures]


def _row(number: int, files: dict[int, Path]) -> Pictures:
    steps, title, pictures = sorted(files), "", list[Picture]()
    last = min(len(steps), _MAX_STEPS) - 1
    for step in dict.fromkeys(steps[round(at * (len(steps) - 1) / max(last, 1))] for at in range(last + 1)):
        with suppress(ValueError, ImportError):
            content, title = _small(files[step])
            pictures.append(Picture(f"step {step:,}", content))
    return Pictures(title or f"Sample {number}", pictures)


def _small(path: Path) -> tuple[bytes, str]:
    """A small JPEG of a PNG file, and its description.

    Raises:
        ValueError: it cannot be read.
    """
    from PIL import Image

    content = io.BytesIO()
    try:
        with Image.open(io.BytesIO(read_small(path, _MAX_BYTES)), formats=["PNG"]) as image:
            if math.prod(image.size) > _MAX_PIXELS:
                raise ValueError(f"it has {math.prod(image.size):,} pixels")
            described = str(image.info.get("Description", ""))[:_MAX_TITLE]
            image.thumbnail((_SIDE, _SIDE))
            image.convert("RGB").save(content, "JPEG", quality=85)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"it cannot be read: {error}") from None
    return content.getvalue(), described
