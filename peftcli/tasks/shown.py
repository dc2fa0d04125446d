"""What a task tells people of its data, for ``inspect`` to print, draw and write as JSON. Readable without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from peftcli.data.findings import Kind


@dataclass(frozen=True)
class TokenText:
    """One token, or several that only together are text."""

    text: str
    ids: tuple[int, ...] = ()
    trained: bool = False
    """Whether it counts in the loss."""
    special: bool = False
    """Whether it marks something, as the end of a turn, and is no text."""
    label: str = ""
    """What it is trained to be, where that is no text: the type of an entity, a part of speech. One of its text's
    ``label_names``."""


@dataclass(frozen=True)
class Text:
    """A text, token by token."""

    tokens: Sequence[TokenText]
    title: str = ""
    label_names: Sequence[str] = ()
    """All labels that tokens of the task may have, in the same order in each text: their order gives the colours."""
    beside: bool = False
    """Whether to compare it with the text before it: the two stand side by side where there is room."""


@dataclass(frozen=True)
class Label:
    """What the model is trained to answer: the name of a class, a number."""

    text: str
    title: str = "label"


@dataclass(frozen=True)
class Image:
    """A picture."""

    source: str
    """Its file, or where it comes from."""
    width: int
    """In pixels, as is ``height``."""
    height: int
    mode: str
    """Pillow's name of its channels: L, RGB, RGBA."""
    thumbnail: bytes
    """A small copy, as PNG."""
    title: str = "image"

    def as_dict(self) -> dict[str, Any]:
        """The picture as ``inspect --json`` prints it."""
        return {name: getattr(self, name) for name in ("source", "width", "height", "mode")}


@dataclass(frozen=True)
class Facts:
    """Other facts about an example: name -> value."""

    values: Mapping[str, str]


Part = Text | Label | Image | Facts


@dataclass(frozen=True)
class Shown:
    """One example, as people see it."""

    parts: Sequence[Part] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    """What ``inspect --json`` prints of it besides of the parts, or in their place."""
    summary: str = ""
    """Added to its size in the heading: ``12 trained``."""

    def as_dict(self) -> dict[str, Any]:
        """The example as ``inspect --json`` prints it."""
        found = dict(self.values)
        texts = ["".join(token.text for token in part.tokens) for part in self.parts if isinstance(part, Text)]
        if texts:
            found.setdefault("text", "\n".join(texts))
        for part in self.parts:
            if isinstance(part, Label):
                found.setdefault("label", part.text)
            elif isinstance(part, Image) and "images" not in found:
                found["image"] = part.as_dict()
            elif isinstance(part, Facts):
                found.setdefault("facts", {}).update(part.values)
        return found


def side_by_side(parts: Sequence[Part]) -> list[list[Part]]:
    """Return the parts in their order, in groups: texts to compare share one, every other part is alone."""
    groups = list[list[Part]]()
    for part in parts:
        if groups and isinstance(part, Text) and part.beside:
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


@dataclass(frozen=True)
class Shared:
    """A part of each row that training and evaluation data should not share, as prompts."""

    name: str
    """Its key below ``train_in_eval`` in ``inspect --json``."""
    kind: Kind
    """The finding about evaluation rows that share it with a training row but are not equal to one."""
    hashes: np.ndarray
    """A hash for each used row; 0: the row has no such part."""


@dataclass(frozen=True)
class Description:
    """What a task knows of all examples together."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    """Added to the audit in ``inspect --json``."""
    lines: Mapping[str, str] = field(default_factory=dict)
    """The same in words: name -> value."""
    shared: Sequence[Shared] = ()
