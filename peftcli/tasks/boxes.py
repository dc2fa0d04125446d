"""Boxes of objects on pictures: read from rows, moved as pictures are changed, drawn.

A box is [left, top, width, height] in pixels of the picture as it is shown.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from peftcli.data.rows import shortened, truth_in
from peftcli.data.text_rows import parse_json

if TYPE_CHECKING:
    from PIL.Image import Image

_BOXES = ("bbox", "bboxes", "boxes", "box")
_CATEGORIES = ("category", "categories", "label", "labels", "class", "classes", "category_id")
_CROWD = "iscrowd"
_ROUNDING = 0.5
"""Pixels by which a box may leave its picture; that part is cut off."""
_LEAST_PART = 0.7
"""Of a side of the picture, what a crop keeps at least."""
_LEAST_SIDE = 1.0
"""Of a box that is cut, in pixels."""
_LEGIBLE = 480
"""Pixels of the longer side of a picture on which names are drawn, about."""
_GOLDEN = 0.618
"""Of the circle of hues, from one class to the next."""


@dataclass(frozen=True)
class Objects:
    """The objects of a row."""

    boxes: list[Any]
    categories: list[Any]
    crowd: list[bool]
    """Whether the box is about several that cannot be told apart: they are neither trained nor measured."""


def objects_of(value: Any) -> Objects:
    """Return the objects that a row's value holds: lists by name, or a list of objects, also as JSON text.

    Raises:
        ValueError: it holds something else.
    """
    if isinstance(value, str):
        try:
            value = parse_json(value)[0]
        except ValueError:
            raise ValueError(f"expected JSON with bbox and category, found {shortened(value)}") from None
    if isinstance(value, list):
        if not all(isinstance(each, Mapping) for each in value):
            raise ValueError(f"expected objects with bbox and category, found {shortened(value)}")
        value = {
            name: [each.get(name) for each in value] for name in dict.fromkeys(key for each in value for key in each)
        }
    if value is None or value == {}:
        return Objects([], [], [])
    if not isinstance(value, Mapping):
        raise ValueError(f"expected bbox and category, found {shortened(value)}")
    boxes, categories = (_list_of(value, names) for names in (_BOXES, _CATEGORIES))
    if len(boxes) != len(categories):
        raise ValueError(f"has {len(boxes)} boxes and {len(categories)} categories")
    crowd = value.get(_CROWD)
    marks = [truth_in(each) is True for each in crowd] if isinstance(crowd, Sequence) else [False] * len(boxes)
    if len(marks) != len(boxes):
        raise ValueError(f"has {len(boxes)} boxes and {len(marks)} marks of a crowd")
    return Objects(boxes, categories, marks)


def _list_of(value: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    found = next((value[name] for name in names if name in value), None)
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise ValueError(f"expected a list in {names[0]}, found {shortened(value)}")
    return list(found)


def checked_boxes(boxes: Sequence[Any], size: tuple[int, int], box_format: str) -> np.ndarray:
    """Return the boxes (N, 4) of a picture of this size, which each lies in.

    Raises:
        ValueError: one does not, or has no area; the message says which.
    """
    found = np.zeros((len(boxes), 4))
    for at, given in enumerate(boxes):
        try:
            found[at] = np.asarray(given, np.float64)
            if not np.isfinite(found[at]).all() or np.shape(given) != (4,):
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(f"box {at + 1} is {shortened(given)}, and not four numbers") from None
        left, top, right, bottom = found[at] + [0, 0, *(found[at, :2] if box_format == "xywh" else (0, 0))]
        shown = f"box {at + 1}, {[float(f'{each:g}') for each in found[at]]} ({box_format}),"
        if right < left or bottom < top:
            swapped = "has a width or height below 0" if box_format == "xywh" else "has its corners swapped"
            raise ValueError(f"{shown} {swapped}")
        if right == left or bottom == top:
            raise ValueError(f"{shown} has no area")
        outside = max(-left, -top, right - size[0], bottom - size[1])
        if outside > _ROUNDING or left >= size[0] or top >= size[1] or right <= 0 or bottom <= 0:
            raise ValueError(f"{shown} leaves the picture of {size[0]} x {size[1]} pixels")
        corners = np.clip([left, top, right, bottom], 0, [*size, *size])
        found[at] = [*corners[:2], *(corners[2:] - corners[:2])]
    return found


def lie_in(boxes: Sequence[Any], size: tuple[int, int], box_format: str) -> bool:
    """Return whether all boxes, of which there are some, lie in the picture if they are of this form."""
    try:
        return len(checked_boxes(boxes, size, box_format)) > 0
    except ValueError:
        return False


@dataclass(frozen=True)
class Cut:
    """The part of a picture that a model sees, mirrored or not."""

    left: int
    top: int
    right: int
    bottom: int
    flipped: bool = False

    @classmethod
    def drawn(cls, ways: Sequence[str], draw: int, size: tuple[int, int], boxes: np.ndarray) -> Cut:
        """Draw how a picture is changed, in the ``ways`` of augmentation; the same for equal ``draw``.

        Of a picture with objects, at least one stays.
        """
        random = np.random.default_rng(draw)
        flipped, crops, shares, places = (
            random.random() < 0.5,
            random.random() < 0.5,
            random.random(2),
            random.random(2),
        )
        whole = cls(0, 0, *size, flipped="flip" in ways and bool(flipped))
        if "crop" not in ways or not crops:
            return whole
        edges = np.maximum(1, np.rint(np.array(size) * (_LEAST_PART + (1 - _LEAST_PART) * shares))).astype(int)
        left, top = np.rint((np.array(size) - edges) * places).astype(int).tolist()
        part = cls(left, top, left + int(edges[0]), top + int(edges[1]), whole.flipped)
        return part if not len(boxes) or part.moved(boxes)[1].any() else whole

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.right - self.left, self.bottom - self.top

    def moved(self, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where boxes (N, 4) are on it, cut at its edges, and which are kept: their middle is on it (N,)."""
        edges = np.array([self.left, self.top, self.right, self.bottom], np.float64)
        middles = boxes[:, :2] + boxes[:, 2:] / 2
        kept = ((middles >= edges[:2]) & (middles <= edges[2:])).all(axis=1)
        begins = np.clip(boxes[:, :2], edges[:2], edges[2:]) - edges[:2]
        sides = np.clip(boxes[:, :2] + boxes[:, 2:], edges[:2], edges[2:]) - edges[:2] - begins
        if self.flipped:
            begins[:, 0] = self.size[0] - begins[:, 0] - sides[:, 0]
        whole = (sides >= np.minimum(_LEAST_SIDE, boxes[:, 2:])).all(axis=1)
        return np.concatenate([begins, sides], axis=1), kept & whole

    def of(self, image: Image) -> Image:
        """Return the part of a picture."""
        from PIL import Image

        part = image if self.size == image.size else image.crop((self.left, self.top, self.right, self.bottom))
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flipped else part


def draw_boxes(image: Image, boxes: np.ndarray, classes: Sequence[int], names: Sequence[str] = ()) -> Image:
    """Return the picture with its boxes, each in the colour of its class, and their names.

    With names, a small picture is enlarged, so that they can be read.
    """
    from PIL import ImageDraw

    scale = max(1, _LEGIBLE // max(image.size)) if names else 1
    drawn = image.convert("RGB").resize((image.width * scale, image.height * scale), 0)
    pen, width, letters = ImageDraw.Draw(drawn), max(1, round(max(drawn.size) / 200)), max(10, max(drawn.size) // 25)
    for at, (left, top, wide, high) in enumerate((np.asarray(boxes) * scale).tolist()):
        red, green, blue = colorsys.hsv_to_rgb(classes[at] * _GOLDEN % 1, 0.8, 1.0)
        colour = (round(red * 255), round(green * 255), round(blue * 255))
        pen.rectangle((left, top, max(left, left + wide), max(top, top + high)), outline=colour, width=width)
        if names:
            place = pen.textbbox((left + width, top + width), names[at], font_size=letters)
            pen.rectangle(place, fill=colour)
            pen.text((left + width, top + width), names[at], fill=(0, 0, 0), font_size=letters)
    return drawn
