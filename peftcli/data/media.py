"""Files of images and sounds that rows name, or that are rows themselves.

Names of folders are those that people give them: no task is meant by them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from peftcli.data.rows import Place, Row, count_of
from peftcli.data.text_rows import first_line
from peftcli.errors import DataError
from peftcli.guard.files import read_small

MEDIA = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"), "image"),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".mp3"), "audio"),
}
"""Extension of a file of an image or a sound -> column with its path."""
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""A byte of a name that is not UTF-8, as Python reads it."""
_READ = {
    "image": ("image", "file_name", "img", "image_file_name"),
    "audio": ("audio", "file_name", "path", "file", "audio_file_name"),
}
"""Names under which tasks find a column of files."""
_NUMBERS = re.compile(r"[\d.\s-]+", re.ASCII)
"""A text that is no caption: boxes of objects, as YOLO's, or an index."""
_MAX_NAME, _MAX_ENTRIES, _MAX_FOLDERS, _MAX_CAPTION = 255, 10_000, 64, 1 << 20
SAMPLE = 20
"""Rows from which it is found how files are named."""
_IMAGE_FOLDERS = {"image", "images", "img", "imgs", "jpegimages", "photo", "photos", "picture", "pictures"}
_MASK_FOLDERS = {
    *("mask", "masks", "annotation", "annotations", "label", "labels", "gt", "ground_truth", "groundtruth"),
    *("segmentation", "segmentations", "segmentationclass", "trimaps"),
}
MASK_ENDING = re.compile(r"[_-](?:mask|seg|segmentation|gt|label|labels|annotation)$", re.IGNORECASE)
"""What the name of a mask's file has after the name of its image."""


def is_media(name: str) -> bool:
    """Return whether a file name has the extension of an image or a sound."""
    return Path(name).suffix.lower() in MEDIA


# --- files that rows name ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MediaRule:
    """How the values of a column name files: in a folder, without their suffix, or under another column's name."""

    column: str
    target: str
    """The column that gets the path."""
    folder: str
    """Below the folder of the row's file; empty, or with a slash at its end."""
    suffix: str
    """What is missing at the end of the values."""

    def apply(self, row: Row) -> None:
        """Set the path."""
        value = row.values.get(self.column)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            row.values[self.target] = f"{self.folder}{value}{self.suffix}"

    def described(self) -> str:
        """Return what the user should know."""
        into = "" if self.target == self.column else f", as the column {self.target}"
        return f"the files that {self.column} names are {self.folder}{'...'}{self.suffix}{into}"


def find_rules(rows: Sequence[Row], name: str) -> list[MediaRule]:
    """Find the columns whose values name files that lie in another folder, or lack a suffix.

    ``rows`` are the first ones of the file ``name``. Files that rows name plainly need no rule, unless one column names
    files under a name that no task looks for.
    """
    rows = rows[:SAMPLE]
    columns = [column for column in rows[0].values if _may_be_names(rows, column)] if rows else []
    plain = {column: kind for column in columns if (kind := _kind_of_plain(rows, column))}
    known = {column for names in _READ.values() for column in names}
    if plain:
        [(column, kind), *others] = plain.items()
        if others or known & rows[0].values.keys():
            return []
        return [MediaRule(column, kind, "", "")]
    named = known & rows[0].values.keys() if rows else set()
    for column in [each for each in columns if each in named or not named]:
        if found := _elsewhere(rows, column, name):
            folder, suffix, kind = found
            return [MediaRule(column, column if column in _READ[kind] else kind, folder, suffix)]
    return []


def _may_be_names(rows: Sequence[Row], column: str) -> bool:
    values = [row.values.get(column) for row in rows]
    texts = [str(value) for value in values if isinstance(value, str | int) and not isinstance(value, bool)]
    is_short = all(0 < len(text) <= _MAX_NAME and "\n" not in text and "\0" not in text for text in texts)
    return len(texts) == len(values) and is_short and len({*texts}) == len(texts)


def _kind_of_plain(rows: Sequence[Row], column: str) -> str | None:
    """The kind of the files that the values of a column are."""
    names = [str(row.values[column]) for row in rows]
    if not all(map(is_media, names)):
        return None
    there = all((row.folder / name).is_file() or Path(name).is_file() for row, name in zip(rows, names, strict=True))
    return MEDIA[Path(names[0]).suffix.lower()] if there else None


def _elsewhere(rows: Sequence[Row], column: str, name: str) -> tuple[str, str, str] | None:
    """The folder, missing suffix and kind of the files that the values of a column name; None: none, or several."""
    top, first = rows[0].folder, str(rows[0].values[column])
    suffixes = [""] if is_media(first) else [each for low in MEDIA for each in (low, low.upper())]
    found = [
        (folder, suffix)
        for folder in ("", *_folders(top))
        for suffix in suffixes
        if (folder or suffix) and (top / f"{folder}{first}{suffix}").is_file()
    ]
    values = [str(row.values[column]) for row in rows]
    found = [pair for pair in found if all((top / f"{pair[0]}{value}{pair[1]}").is_file() for value in values)]
    stem = Path(name).stem.split(".")[0].lower()
    named = [pair for pair in found if pair[0].lower().startswith(stem)] if len(found) > 1 else found
    if len(named) != 1:
        return None
    folder, suffix = named[0]
    return folder, suffix, MEDIA[Path(first + suffix).suffix.lower()]


def _folders(top: Path) -> list[str]:
    try:
        with os.scandir(top) as entries:
            names = [
                entry.name for entry in islice(entries, 10_000) if not entry.name.startswith(".") and entry.is_dir()
            ]
    except OSError:
        return []
    return [f"{name}/" for name in names[:_MAX_FOLDERS]]


# --- files that are rows ----------------------------------------------------------------------------------------------


def media_rows(files: Mapping[str, str], top: str, captions: Mapping[str, str]) -> Iterator[Row | DataError]:
    """Yield one row per image or sound, by names and paths, labelled with the name of its folder.

    photos/cat/1.jpg becomes {"image": "photos/cat/1.jpg", "label": "cat"}. Files directly in ``top`` have no label.
    Images and masks in folders of these names are joined by their stems; a text beside a file is its caption.
    """
    if masks := _masks_of(files, top):
        yield from _pairs(files, masks)
        return
    for name, path in files.items():
        values, place = {MEDIA[Path(path).suffix.lower()]: path}, Place(name, 1)
        folder = path.rpartition("/")[0]
        if caption := captions.get(path):
            try:
                values["text"] = read_small(Path(caption), _MAX_CAPTION).decode("utf-8-sig").strip()
            except (OSError, ValueError) as error:
                yield place.error(f"its text cannot be read: {first_line(error)}", key="text")
                continue
            if _NUMBERS.fullmatch(values["text"]):
                hint = "Move such texts out of the folder."
                yield place.error("the text beside it is numbers, no caption", key="text", hint=hint)
                continue
        elif folder != top:
            values["label"] = folder.rpartition("/")[2]
        if _NOT_UTF8.search(values.get("label", "")):
            yield place.error("the name of its folder is not UTF-8", key="label", hint="Rename the folder.")
        else:
            yield Row(values, place)


def describe_media(files: Mapping[str, str], top: str, captions: Mapping[str, str]) -> str | None:
    """Return what the user should know about how the files are read; None if each is a row."""
    if not (masks := _masks_of(files, top)):
        return f"the texts beside {count_of(len(captions), 'file')} are their captions" if captions else None
    images = len(files) - len(masks)
    return f"{count_of(images, 'image')} and {count_of(len(masks), 'mask')} joined by the names of their files"


def _pairs(files: Mapping[str, str], masks: Mapping[str, str]) -> Iterator[Row | DataError]:
    by_key = {key: path for path, key in masks.items()}
    for name, path in files.items():
        if path in masks:
            continue
        mask = by_key.get(_key(path, _side(path)[1]))
        place = Place(name, 1)
        if mask is None:
            yield place.error("has no mask of this name", key="annotation", hint="Leave such images out of the folder.")
        else:
            yield Row({"image": path, "annotation": mask}, place)


def _masks_of(files: Mapping[str, str], top: str) -> dict[str, str]:
    """The masks among images, each with what it shares with its image; empty if the folders are classes."""
    sides = {path: _side(path, len(top)) for path in files.values()}
    if {side for side, _ in sides.values()} != {"image", "mask"}:
        return {}
    images = {_key(path, at) for path, (side, at) in sides.items() if side == "image"}
    masks = {path: _key(path, at) for path, (side, at) in sides.items() if side == "mask"}
    joined = sum(key in images for key in masks.values())
    return masks if joined and 2 * joined >= min(len(images), len(masks)) else {}


def _side(path: str, start: int = 0) -> tuple[str | None, int]:
    """Whether a folder of the path holds images or masks, and which: the number of this part."""
    parts = path.split("/")
    for at in range(len(parts) - 2, path[:start].count("/"), -1):
        name = parts[at].lower()
        if name in _MASK_FOLDERS or name.endswith(("_masks", "_mask", "annot")):
            return "mask", at
        if name in _IMAGE_FOLDERS:
            return "image", at
    return None, 0


def _key(path: str, at: int) -> str:
    """The path without the folders of its kind, the ending of a mask's name, and its suffix."""
    parts = path.split("/")
    above = parts[:at]
    while above and above[-1].lower() in _MASK_FOLDERS:  # annotations/trimaps
        above.pop()
    stem = MASK_ENDING.sub("", parts[-1].rpartition(".")[0])
    return "/".join([*above, *parts[at + 1 : -1], stem])


def captions_of(media: Iterable[str], texts: Mapping[str, str]) -> dict[str, str]:
    """Return the text file beside each file of media, by its stem; empty unless nearly all have one."""
    by_stem = {path.rpartition(".")[0]: path for path in texts.values()}
    media = list(media)
    found = {path: text for path in media if (text := by_stem.get(path.rpartition(".")[0]))}
    return found if found and len(found) >= 0.9 * len(media) else {}
