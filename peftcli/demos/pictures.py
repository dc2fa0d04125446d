"""Pictures of letters and signs, drawn with the fonts that matplotlib brings (DejaVu, STIX), moved and turned a little.

The fonts of the evaluation pictures draw no training picture, where a demo says so.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL.ImageFont import FreeTypeFont

SEED = 0
SIDE = 28
SCENE = 64
DARK = 64
"""Pixels of a picture that are no darker belong to the sign."""
CLASSES = "ABCDEFGHJK"
OTHER_CHARACTERS = "LMNPQRTUVWYZ234567&?%"
"""What the small base model of letters knows."""
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSans-Oblique")
HELD_OUT_FONTS = ("STIXGeneral", "STIXGeneralBol", "DejaVuSansMono-Oblique")
QUESTION = "What does the picture show?"
SIGNS = {
    **{"star": "★", "sun": "☀", "snowman": "☃", "umbrella": "☂", "phone": "☎", "plane": "✈", "note": "♫"},
    **{"knight": "♞", "rook": "♜", "anchor": "⚓", "spade": "♠", "club": "♣", "diamond": "♦", "heart": "♥"},
}
"""Name of a sign in a prompt -> the character."""
SUITS = ("heart", "diamond", "club")
"""The signs that are found in scenes; 0 of a mask is the background, 1 a heart."""
SUIT_FONTS = ("STIXGeneral", "DejaVuSansMono-Oblique")
"""The held-out fonts that have the suits."""
TAUGHT = "heart"
"""The sign that the model of the demo has not seen."""


@cache
def _font(name: str, size: int) -> FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)


def picture(character: str, font: str, draw: np.random.Generator, side: int = SIDE, turn: float = 12) -> np.ndarray:
    """Draw a character, light on dark: (side, side), uint8.

    Args:
        character: What to draw.
        font: The name of a font of matplotlib's.
        draw: Decides size, place and turn.
        side: Pixels.
        turn: The most that it is turned, in degrees.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    image = Image.new("L", (side, side))
    centre = side / 2 + draw.uniform(-0.08, 0.08, 2) * side
    size = int(draw.uniform(0.7, 0.95) * side)
    ImageDraw.Draw(image).text(tuple(centre), character, fill=255, font=_font(font, size), anchor="mm")
    return np.asarray(image.rotate(draw.uniform(-turn, turn), Image.Resampling.BILINEAR))


def letters(folder: Path) -> None:
    """Pictures of ten letters, in a folder each: train/A/, eval/A/."""
    import numpy as np

    for part, fonts, count in (("train", FONTS, 60), ("eval", HELD_OUT_FONTS, 20)):
        draw = np.random.default_rng([SEED, count])
        for letter in CLASSES:
            pictures = [picture(letter, str(draw.choice(fonts)), draw) for _ in range(count)]
            _save(folder / part / letter, pictures)


def letters_in_words(folder: Path) -> None:
    """The same pictures, with a question and its answer each: train.jsonl, eval.jsonl."""
    letters(folder)
    for part in ("train", "eval"):
        rows = [
            {
                "image": str(path.relative_to(folder)),
                "prompt": QUESTION,
                "completion": f"The letter {path.parent.name}.",
            }
            for path in sorted((folder / part).glob("*/*.png"))
        ]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def scenes(folder: Path) -> None:
    """Pictures of up to four hearts, diamonds and clubs, and a mask of each: train.jsonl and eval.jsonl."""
    import numpy as np

    for part, fonts, count in (("train", FONTS, 400), ("eval", SUIT_FONTS, 60)):
        draw, rows = np.random.default_rng([SEED, count]), []
        drawn = [_any_scene(fonts, draw) for _ in range(count)]
        _save(folder / part, [image for image, _ in drawn])
        _save(folder / part, [mask for _, mask in drawn], ".mask")
        rows = [
            {"image": f"{part}/{number:03}.png", "annotation": f"{part}/{number:03}.mask.png"}
            for number in range(count)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")


def boxed_scenes(folder: Path) -> None:
    """Pictures of up to four hearts, diamonds and clubs, and the box of each: train.jsonl and eval.jsonl."""
    import numpy as np

    for part, fonts, count in (("train", FONTS, 320), ("eval", SUIT_FONTS, 40)):
        draw, rows, drawn = np.random.default_rng([SEED, count]), [], []
        for number in range(count):
            kinds = draw.integers(0, len(SUITS), 4)
            image, boxes = boxed([picture(SIGNS[SUITS[kind]], str(draw.choice(fonts)), draw) for kind in kinds], draw)
            drawn.append(image)
            objects = {"bbox": [*boxes.values()], "category": [SUITS[kinds[at]] for at in boxes]}
            rows.append({"image": f"{part}/{number:03}.png", "objects": objects})
        _save(folder / part, drawn)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")


def boxed(
    images: list[np.ndarray], draw: np.random.Generator, dark: int = DARK
) -> tuple[np.ndarray, dict[int, list[int]]]:
    """Make a scene of four pictures; return it, and the boxes [left, top, width, height] of those that are on it."""
    import numpy as np

    image, mask = scene(np.stack([*images]), np.arange(1, 5), draw, dark)
    boxes = dict[int, list[int]]()
    for at in range(4):
        if len(places := np.argwhere(mask == at + 1)):
            (top, left), (high, wide) = places.min(axis=0), np.ptp(places, axis=0) + 1
            boxes[at] = [int(each) for each in (left, top, wide, high)]
    return image, boxes


def _any_scene(fonts: tuple[str, ...], draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    values = draw.integers(0, len(SUITS), 4)
    images = [picture(SIGNS[SUITS[value]], str(draw.choice(fonts)), draw) for value in values]
    return scene(np.stack(images), values + 1, draw)


def scene(
    images: np.ndarray, values: np.ndarray, draw: np.random.Generator, dark: int = DARK
) -> tuple[np.ndarray, np.ndarray]:
    """Put pictures of 28 x 28 pixels at random places of a noisy background, one in each quarter, or none.

    Args:
        images: (4, 28, 28), uint8.
        values: (4,): what the pixels of each are in the mask.
        draw: Decides.
        dark: Pixels that are no darker are put there.

    Returns:
        The picture and its mask, each (64, 64), uint8.
    """
    import numpy as np

    image = draw.integers(0, 100) + draw.integers(0, 60, (SCENE, SCENE))
    mask, half = np.zeros((SCENE, SCENE), np.uint8), SCENE // 2
    for at in draw.permutation(4)[: draw.integers(2, 5)]:
        top, left = draw.integers(0, half - SIDE + 1, 2) + half * np.array(divmod(int(at), 2))
        part = np.s_[top : top + SIDE, left : left + SIDE]
        thing = images[at] >= dark
        image[part] = np.where(thing, images[at], image[part])
        mask[part] = np.where(thing, values[at], mask[part])
    return image.astype(np.uint8), mask


def hearts(folder: Path) -> None:
    """Pictures of hearts: train/ and eval/."""
    import numpy as np

    for part, count in (("train", 20), ("eval", 32)):
        draw = np.random.default_rng([SEED, count])
        _save(folder / part, [sign(TAUGHT, draw) for _ in range(count)])


def sign(name: str, draw: np.random.Generator, side: int = 32) -> np.ndarray:
    """Draw a sign: (side, side), uint8."""
    return picture(SIGNS[name], ("DejaVuSans", "DejaVuSans-Bold")[int(draw.integers(2))], draw, side, turn=8)


def _save(folder: Path, pictures: list[np.ndarray], ending: str = "") -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number, values in enumerate(pictures):
        Image.fromarray(values).save(folder / f"{number:03}{ending}.png")
