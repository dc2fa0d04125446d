"""Conversations with pictures, as rows hold them: marks in texts, or parts of contents that name a picture."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from peftcli.data.findings import Finding
from peftcli.data.store import View
from peftcli.data.used_rows import repeats
from peftcli.tasks.findings import SEEN
from peftcli.tasks.shown import Description, TokenText
from peftcli.tasks.text.audit import TextAudit
from peftcli.tasks.text.formats import PICTURE_PARTS, SHAREGPT_ROLES, Message, turns_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "<image>"
"""Stands in the text of a row for a picture."""
_DATA, _FILE = "data:", "file://"


def pictures_of(value: Any) -> list[Any]:
    """The pictures of a column: a list, also one that is written as text, one picture, or none."""
    with suppress(ValueError):  # the name of a file
        value = turns_in(value)
    return [] if value is None else value if isinstance(value, list) else [value]


def marked_turns(messages: Any, given: list[Any]) -> tuple[list[Message], list[Any]]:
    """Return messages whose contents are texts with marks, and their pictures in order.

    Turns of ``from`` and ``value`` become messages. A part may name its picture; other parts and marks stand for those
    of ``given``.
    """
    with suppress(ValueError):  # the reader of messages says what is wrong
        messages = turns_in(messages)
    if not isinstance(messages, list):
        return messages, given
    turns, named = list[Any](), list[Any]()  # None: one of the given pictures
    for turn in map(_message, messages):
        content = turn.get("content") if isinstance(turn, dict) else None
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            texts = []
            for part in content:
                is_image = part.get("type") in PICTURE_PARTS
                texts.append(MARK if is_image else part.get("text"))
                named += [_picture(part)] * is_image
                named += [None] * (0 if is_image else str(texts[-1]).count(MARK))
            if all(isinstance(text, str) for text in texts):
                turn = turn | {"content": "".join(texts)}
        elif isinstance(content, str):
            named += [None] * content.count(MARK)
        turns.append(turn)
    rest = iter(given)
    pictures = [next(rest, None) if name is None else name for name in named]
    return turns, [_content(picture) for picture in [*pictures, *rest] if picture is not None]


def _message(turn: Any) -> Any:
    """A turn of ``from`` and ``value`` as a message; any other value as it is."""
    if not isinstance(turn, dict) or "role" in turn or not {"from", "value"} <= turn.keys():
        return turn
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    role = SHAREGPT_ROLES.get(str(turn["from"]), turn["from"])
    return {**others, "role": role, "content": turn["value"]}


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


def fold_pictures(tokens: Iterable[TokenText], runs: Iterable[Sequence[int]]) -> list[TokenText]:
    """Return the tokens of a row with one in the place of all those of a picture; ``runs`` are these, in order."""
    tokens = list(tokens)
    ids, starts = [token for each in tokens for token in each.ids], {0: 0}
    for at, each in enumerate(tokens):
        starts[max(starts) + len(each.ids)] = at + 1
    found, last, after = list[TokenText](), 0, 0
    for run in runs:
        begins = (at for at in range(after, len(ids)) if ids[at : at + len(run)] == list(run))
        begin = next((at for at in begins if {at, at + len(run)} <= starts.keys()), None)
        if begin is None:  # it is drawn as it is
            continue
        after = begin + len(run)
        picture = TokenText(f"[image: {len(run):,} tokens]", tuple(dict.fromkeys(run)), special=True)
        found += [*tokens[last : starts[begin]], picture]
        last = starts[after]
    return [*found, *tokens[last:]]


class PictureAudit:
    """All examples of conversations with pictures, examined once.

    Column ``image_tokens`` says how many tokens are those of pictures, and ``seen`` which pictures they are.
    """

    def __init__(self, view: View, tokenizer: PreTrainedTokenizerBase):
        parts = [part for part in view.parts if len(part.store.row_of)]
        counts = [part.store.values("image_tokens", 0, len(part.store.row_of))[0][part.examples] for part in parts]
        self._tokens = np.concatenate([np.zeros(0, np.int64), *counts])
        self._text = TextAudit(view, tokenizer, aligned=True, beside=("seen",), unread=self._tokens)
        self.view = view

    def findings(self) -> list[Finding]:
        """Return the findings about texts and pictures."""
        rows, asked = self._text.rows, self._text.prompts
        tokens, whole = rows.sums(self._tokens), rows.hashes("input_ids", "seen")
        first = asked[~repeats(whole)]  # of each answer to a question once
        differ = np.isin(asked, first[repeats(first)]) & (asked != 0) & (tokens > 0)
        masks = {"answers_differ": differ, "no_picture": tokens == 0}
        return [*self._text.findings(), *rows.findings((SEEN[name], mask) for name, mask in masks.items())]

    def describe(self) -> Description:
        """Return what ``inspect`` also reports of the rows."""
        found, count = self._text.describe(), int(self._tokens.sum())
        share = count / max(1, int(self.view.sizes.sum()))
        return replace(
            found,
            facts={"image_tokens": count, "share_of_images": share, **found.facts},
            lines={"image tokens": f"{count:,} ({share:.1%})", **found.lines},
        )
