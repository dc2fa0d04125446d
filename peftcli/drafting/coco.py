"""COCO's JSON: its boxes, its captions, or the masks of its outlines, drawn beside the recipe."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.data.rows import count_of
from peftcli.errors import DataError
from peftcli.guard.files import read_small
from peftcli.system.outputs import write_output

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_MOST_BYTES, _MOST_PIXELS, _MOST_CLASSES = 512 << 20, 100_000_000, 254
_BACKGROUND = "background"


@dataclass(frozen=True)
class FromCoco:
    """The rows of a COCO file."""

    rows: list[dict[str, Any]]
    labels: list[str]
    """Names of the classes, of masks by their values; none for captions."""
    says: str


def find_coco(path: Path) -> Path | None:
    """Return the COCO file that a path is, or the only one in or beside a folder of pictures; None without one."""
    if path.is_dir():
        files = [each for each in [*path.glob("*.json"), *path.glob("annotations/*.json")] if _is_coco(each)]
        return files[0] if len(files) == 1 else None
    return path if path.suffix.lower() == ".json" and _is_coco(path) else None


def _is_coco(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        start = file.read(1 << 16)
        return start.lstrip().startswith(b"{") and any(
            key in start for key in (b'"file_name"', b'"coco_url"', b'"bbox"')
        )
    return False


def read_coco(path: Path, folder: Path, *, boxes: bool = False) -> FromCoco | None:
    """Draw the masks of a COCO file into ``folder``, one for each picture that is there; None: it is no COCO file.

    With ``boxes``, and of a file without outlines, the rows have its boxes instead; of captions, texts.

    Raises:
        DataError: its pictures are nowhere near, or it has nothing of these.
    """
    try:
        whole = json.loads(read_small(path, _MOST_BYTES))
        pictures = {each["id"]: each for each in whole["images"]}
        marks = defaultdict[Any, list[Mapping[str, Any]]](list)
        for each in whole["annotations"]:
            marks[each["image_id"]].append(each)
        names = {each["id"]: str(each["name"]) for each in whole.get("categories", ())}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    files = {key: _find(path, str(each.get("file_name", ""))) for key, each in pictures.items()}
    stored = {key: file for key, file in files.items() if file is not None}
    there = {key: file for key, file in stored.items() if marks[key]}
    if not there:
        hint = "Unpack them beside the file, or into a folder images beside it."
        raise DataError(f"none of its {count_of(len(files), 'picture')} is in its folder", file=str(path), hint=hint)
    lost = f"; {count_of(len(files) - len(there), 'picture')} left out" if len(files) > len(there) else ""
    is_captions = any("caption" in each for each in marks[next(iter(there))])
    if boxes or not (is_captions or any(each.get("segmentation") for key in there for each in marks[key])):
        return _with_boxes(path, folder, stored, marks, names)
    if is_captions:
        rows = list(_captions(there, marks, folder))
        return FromCoco(rows, [], f"{count_of(len(rows), 'caption')} of COCO{lost}")
    used = {each.get("category_id") for some in marks.values() for each in some}
    values = {key: at for at, key in enumerate((key for key in names if key in used), start=1)}
    if not 0 < len(values) <= _MOST_CLASSES:
        raise DataError(f"has {len(values)} classes; masks hold 1 to {_MOST_CLASSES}", file=str(path))
    rows, unread = list[dict[str, Any]](), 0
    for key, file in there.items():
        drawn = _draw(pictures[key], marks[key], values)
        unread += len(marks[key]) - drawn[1]
        if drawn[1]:
            target = folder / f"{file.stem}-{key}.png"
            _save(drawn[0], target)
            rows.append({"image": os.path.relpath(file, folder.parent), "annotation": f"{folder.name}/{target.name}"})
    if not rows:
        hint = "Its masks are compressed. For its boxes: peftcli init --task object_detection."
        raise DataError("has no outlines from which masks could be drawn", file=str(path), hint=hint)
    lost += f"; {count_of(unread, 'annotation')} without an outline left out" if unread else ""
    has_boxes = any(each.get("bbox") for key in there for each in marks[key])
    lost += "; for boxes: --task object_detection" if has_boxes else ""
    says = f"masks of {count_of(len(rows), 'picture')} were drawn into {folder}{lost}"
    return FromCoco(rows, [_BACKGROUND, *(names[key] for key in values)], says)


def _captions(
    there: Mapping[Any, Path], marks: Mapping[Any, Sequence[Mapping[str, Any]]], folder: Path
) -> Iterator[dict[str, Any]]:
    """Yield a row for each caption of a picture that is there."""
    for key, file in there.items():
        for each in marks[key]:
            yield {"image": os.path.relpath(file, folder.parent), "text": str(each.get("caption", "")).strip()}


def _with_boxes(
    path: Path, folder: Path, files: Mapping[Any, Path], marks: Mapping[Any, Any], names: Mapping[Any, str]
) -> FromCoco:
    """The rows of boxes, also those of pictures without any; a box without area is left out."""
    rows, used, flat = list[dict[str, Any]](), set[str](), 0
    for key, file in files.items():
        found = [each for each in marks[key] if each.get("category_id") in names and len(each.get("bbox") or ()) == 4]
        kept = [each for each in found if each["bbox"][2] > 0 and each["bbox"][3] > 0]
        flat += len(found) - len(kept)
        kinds = [names[each["category_id"]] for each in kept]
        used.update(kinds)
        objects: dict[str, Any] = {"bbox": [each["bbox"] for each in kept], "category": kinds}
        if any(each.get("iscrowd") for each in kept):
            objects["iscrowd"] = [int(bool(each.get("iscrowd"))) for each in kept]
        rows.append({"image": os.path.relpath(file, folder.parent), "objects": objects})
    if not used:
        raise DataError("has neither outlines nor boxes nor captions", file=str(path))
    says = f"boxes of {count_of(len(rows), 'picture')} of COCO"
    says += f"; {flat:,} without area left out" if flat else ""
    return FromCoco(rows, [each for each in names.values() if each in used], says)


def _find(path: Path, name: str) -> Path | None:
    """The file of a picture: beside the JSON, beside the folder that holds it, or in a folder of pictures there."""
    tops = [top for base in (path.parent, path.parent.parent) for top in (base, base / "images", base / path.stem)]
    tops += [base / path.stem.rpartition("_")[2] for base in (path.parent, path.parent.parent)]  # instances_train2017
    return next((top / name for top in tops if name and (top / name).is_file()), None)


def _draw(
    picture: Mapping[str, Any], marks: Sequence[Mapping[str, Any]], values: Mapping[Any, int]
) -> tuple[Image, int]:
    """The mask of a picture, large things first, and how many of its marks are in it."""
    from PIL import Image, ImageDraw

    width, height = int(picture["width"]), int(picture["height"])
    if not 0 < width * height <= _MOST_PIXELS:
        raise DataError(f"a picture of {width} x {height} pixels", key=str(picture.get("file_name")))
    mask, count = Image.new("L", (width, height)), 0
    for mark in sorted(marks, key=lambda each: -float(each.get("area") or 0)):
        outline, value = mark.get("segmentation"), values.get(mark.get("category_id"))
        if value is None or not outline:
            continue
        if isinstance(outline, list):
            for points in outline:
                if len(points) >= 6:
                    ImageDraw.Draw(mask).polygon([float(each) for each in points], fill=value)
            count += 1
        elif isinstance(outline.get("counts"), list):
            mask.paste(value, mask=Image.fromarray(_runs(outline["counts"], width, height)))
            count += 1
    return mask, count


def _runs(counts: Sequence[int], width: int, height: int) -> np.ndarray:
    """The pixels (height, width), 255 inside, of lengths of runs that alternate, column by column."""
    import numpy as np

    inside = np.repeat(np.arange(len(counts)) % 2, counts).astype(np.uint8) * 255
    return np.resize(inside, width * height).reshape(width, height).T.copy()


def _save(mask: Image, target: Path) -> None:
    import io

    content = io.BytesIO()
    mask.save(content, "PNG")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_output(target, content.getvalue())
