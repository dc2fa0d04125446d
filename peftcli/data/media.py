"""Folders of images or sounds: one row per file, labelled with the name of its folder.

photos/cat/1.jpg    ->    {"image": "photos/cat/1.jpg", "label": "cat"}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from peftcli.data.rows import Place, Row

_COLUMNS = {
    **dict.fromkeys(("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff"), "image"),
    **dict.fromkeys(("wav", "flac", "ogg", "mp3"), "audio"),
}
"""Extension of a file -> column with its path."""


def is_media(name: str) -> bool:
    """Return whether a file name has the extension of an image or a sound."""
    return name.rpartition(".")[2].lower() in _COLUMNS


def media_rows(files: Mapping[str, str], top: str) -> Iterator[Row]:
    """Yield one row per file, by names and paths; files directly in ``top`` have no label."""
    for name, path in files.items():
        values = {_COLUMNS[path.rpartition(".")[2].lower()]: path}
        folder = path.rpartition("/")[0]
        if folder != top:
            values["label"] = folder.rpartition("/")[2]
        yield Row(values, Place(name, 1))
