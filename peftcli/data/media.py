"""Folders of images or sounds: one row per file, labelled with the name of its folder.

photos/cat/1.jpg    ->    {"image": "photos/cat/1.jpg", "label": "cat"}
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from peftcli.data.rows import Place, Row
from peftcli.errors import DataError

_COLUMNS = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"), "image"),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".mp3"), "audio"),
}
"""Extension of a file -> column with its path."""
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""A byte of a name that is not UTF-8, as Python reads it."""


def is_media(name: str) -> bool:
    """Return whether a file name has the extension of an image or a sound."""
    return Path(name).suffix.lower() in _COLUMNS


def media_rows(files: Mapping[str, str], top: str) -> Iterator[Row | DataError]:
    """Yield one row per file, by names and paths; files directly in ``top`` have no label."""
    for name, path in files.items():
        values, place = {_COLUMNS[Path(path).suffix.lower()]: path}, Place(name, 1)
        folder = path.rpartition("/")[0]
        if folder != top:
            values["label"] = folder.rpartition("/")[2]
        if _NOT_UTF8.search(values.get("label", "")):
            yield place.error("the name of its folder is not UTF-8", key="label", hint="Rename the folder.")
        else:
            yield Row(values, place)
