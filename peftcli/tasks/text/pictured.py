"""Conversations with pictures, as rows hold them: marks in texts, or parts of contents that name a picture."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from peftcli.tasks.text.formats import Message, turns_in

MARK = "<image>"
"""Stands in the text of a row for a picture."""
_PICTURES = ("image", "image_url")
"""Types of parts that are pictures: ours, and OpenAI's."""
_DATA, _FILE = "data:", "file://"


def marked_turns(messages: Any, given: list[Any], key: str = "content") -> tuple[list[Message], list[Any]]:
    """Return messages whose contents are texts with marks, and their pictures in order.

    A part may name its picture; other parts and marks stand for those of ``given``. ``key`` is that of a turn's
    content.
    """
    with suppress(ValueError):  # the reader of messages says what is wrong
        messages = turns_in(messages)
    if not isinstance(messages, list):
        return messages, given
    turns, named = list[Any](), list[Any]()  # None: one of the given pictures
    for turn in messages:
        content = turn.get(key) if isinstance(turn, dict) else None
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            texts = []
            for part in content:
                is_image = part.get("type") in _PICTURES
                texts.append(MARK if is_image else part.get("text"))
                named += [_picture(part)] * is_image
                named += [None] * (0 if is_image else str(texts[-1]).count(MARK))
            if all(isinstance(text, str) for text in texts):
                turn = turn | {key: "".join(texts)}
        elif isinstance(content, str):
            named += [None] * content.count(MARK)
        turns.append(turn)
    rest = iter(given)
    pictures = [next(rest, None) if name is None else name for name in named]
    return turns, [_content(picture) for picture in [*pictures, *rest] if picture is not None]


def _picture(part: Mapping[str, Any]) -> Any:
    """The picture that a part names; None: it names none."""
    found = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key) is not None), None)
    return found["url"] if isinstance(found, Mapping) and "url" in found else found


def _content(picture: Any) -> Any:
    """A file, or the bytes that the URL of a picture holds."""
    if not isinstance(picture, str):
        return picture
    if picture.startswith(_DATA):
        with suppress(ValueError):  # else it is no file, which its reader says
            return base64.b64decode(picture.partition(",")[2], validate=True)
    return picture.removeprefix(_FILE)
